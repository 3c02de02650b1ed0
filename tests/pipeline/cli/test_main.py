"""The command line: what is wrong is said in one sentence with the cure, before anything is started."""

from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.lib.errors import StageFailed
from components.lib.methods import known_methods
from components.lib.recipe.loading import load_recipe
from pipeline.cli import main as cli
from pipeline.recipes import RECIPES, find_recipe
from pipeline.runners.run import Result
from tests.components.lib.transformer import zoo

RECIPE = """
methods: {trsp: {ratio: 0.25}}
calibration: {data: TEXT, samples: 4, length: 32}
evaluate: {perplexity: {test: TEXT}, speed: {enabled: false}, controls: [pruned-first]}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    printed: str
    told: str
    """Standard error."""


Espalier = Callable[..., Ended]


@pytest.fixture
def espalier(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Espalier:
    """Run the command in this process."""
    monkeypatch.chdir(tmp_path)

    def espalier(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["espalier", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return espalier


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.release(zoo.SPECIMENS[0].model(layers=4), tmp_path_factory.mktemp("release"))


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A release of four layers; a test may damage it."""
    return Path(shutil.copytree(made, tmp_path / "release"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("w3 w4 w5")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("TEXT", str(tmp_path / "text.txt")))
    return path


class TestBadInput:
    """Each one: one sentence on standard error, exit status 1, no service started, nothing written."""

    @pytest.fixture
    def refusal(
        self, espalier: Espalier, recipe: Path, release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Callable[..., str]:
        def refusal(*arguments: object, model: object = release, name: str = "small", recipe: object = recipe) -> str:
            monkeypatch.setattr(
                "pipeline.services.embedded.services", lambda home: pytest.fail("services were started")
            )
            ended = espalier("run", recipe, "--model", model, "--name", name, "--home", tmp_path / "home", *arguments)
            assert ended.status == 1
            assert ended.printed == ""
            (sentence,) = ended.told.splitlines()
            assert not (tmp_path / "home").exists()
            return sentence.removeprefix("espalier: ")

        return refusal

    @pytest.fixture
    def edit(self, release: Path) -> Callable[..., None]:
        def edit(**fields: object) -> None:
            config = json.loads((release / "config.json").read_text())
            (release / "config.json").write_text(json.dumps(config | fields))

        return edit

    def test_an_unknown_field_with_the_nearest_known_one(self, refusal: Callable[..., str]) -> None:
        said = refusal("--set", "methods.trsp.ratoi=0.5")
        assert said == "the recipe's field 'methods.trsp.ratoi' is not known: did you mean 'ratio'?"

    def test_a_recipe_that_is_not_there(self, refusal: Callable[..., str]) -> None:
        assert refusal(recipe="nothing.yaml").startswith("the recipe nothing.yaml cannot be read")

    def test_a_ratio_that_removes_every_layer(self, refusal: Callable[..., str]) -> None:
        assert refusal("--set", "methods.trsp.ratio=0.95").startswith(
            "methods.trsp.ratio 0.95 removes 4 of the model's 4 layers"
        )

    def test_a_folder_without_a_config(self, release: Path, refusal: Callable[..., str]) -> None:
        (release / "config.json").unlink()
        assert refusal() == f"{release} has no config.json: name the folder of a Hugging Face checkpoint"

    def test_a_folder_that_is_not_there(self, refusal: Callable[..., str]) -> None:
        assert refusal(model="./nothing").startswith("nothing does not exist: name the folder")

    def test_a_checkpoint_that_is_pickled_only(self, release: Path, refusal: Callable[..., str]) -> None:
        (release / "model.safetensors").rename(release / "pytorch_model.bin")
        assert "holds pickled weights only (pytorch_model.bin)" in refusal()

    def test_a_family_that_is_not_known(self, edit: Callable[..., None], refusal: Callable[..., str]) -> None:
        edit(model_type="reformer")
        assert "'reformer'" in refusal()

    def test_a_field_that_speaks_of_layers_and_is_not_known(
        self, edit: Callable[..., None], refusal: Callable[..., str]
    ) -> None:
        edit(layer_scales=[1.0, 2.0, 3.0, 4.0])
        assert "layer_scales" in refusal()

    def test_windows_longer_than_the_model_reads(self, refusal: Callable[..., str]) -> None:
        assert refusal("--set", "calibration.length=128").startswith(
            "calibration.length is 128, and the model reads 64"
        )

    def test_a_text_that_is_not_there(self, refusal: Callable[..., str]) -> None:
        assert "nothing.txt is not a file here" in refusal("--set", "calibration.data=nothing.txt")

    @pytest.mark.parametrize("name", ["a/b", "it's", "", "-x", "a b", "v1.5"])
    def test_a_name_that_cannot_be_registered(self, name: str, refusal: Callable[..., str]) -> None:
        said = f"the registered model's name is {name!r}: use letters, digits, '_' and '-', 128 at most"
        assert refusal(f"--name={name}") == said

    def test_an_mlflow_that_does_not_answer(self, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert refusal().startswith("MLflow at http://127.0.0.1:9 does not answer")

    def test_an_s3_that_does_not_answer(self, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        with_s3(monkeypatch, "http://127.0.0.1:9")
        said = refusal()
        assert said.startswith("the bucket 'some' at http://127.0.0.1:9 cannot be reached")
        assert said.endswith("check AWS_ENDPOINT_URL_S3 and the network")

    @pytest.mark.parametrize("allowed", [(), ("GET", "HEAD")])
    def test_a_bucket_without_permission(
        self, allowed: tuple[str, ...], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with s3_that_allows(*allowed) as address:
            with_s3(monkeypatch, address)
            said = refusal()
        operation = "PutObject" if allowed else "ListObjectsV2"
        assert said.startswith(f"the credentials do not allow {operation} on the bucket 'some' at {address}")
        assert said.endswith("ask for that permission, or name another ESPALIER_BUCKET")

    def test_a_full_disk(
        self, release: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        size = (release / "model.safetensors").stat().st_size
        # The release, the regularised model, the pruned one and a control: one of the four would not fit.
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3.5 * size))
        said = refusal()
        assert said.startswith(f"{tmp_path / 'home'} needs ")
        assert said.endswith("make room, or use another folder")


def with_s3(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    names = {"ESPALIER_BUCKET": "some", "AWS_ENDPOINT_URL_S3": address}
    for name, value in (names | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
        monkeypatch.setenv(name, value)


@contextmanager
def s3_that_allows(*methods: str) -> Iterator[str]:
    """An S3 server with an empty bucket, whose credentials allow these methods of HTTP alone. rclone's knows no permissions."""

    class Server(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            allowed = self.command in methods
            body = b"<ListBucketResult/>" if allowed else b"<Error><Code>AccessDenied</Code></Error>"
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200 if allowed else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class TestARun:
    """With the run itself replaced: what the command is given, and how it ends."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        monkeypatch.setattr("pipeline.cli.summary.print_summary", lambda report, console: console.print("the table"))

        def ends(passed: bool = True, error: Exception | None = None) -> None:
            def run(*arguments: object, on: object) -> Result:
                calls.append(arguments)
                if error:
                    raise error
                report: Any = SimpleNamespace(verdict=SimpleNamespace(passed=passed))
                return Result(report, Path("home/runs/one"))

            monkeypatch.setattr("pipeline.runners.run.run", run)

        ends()
        calls.append(ends)
        return calls

    @pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 3)])
    def test_ends_with_the_verdict_and_the_reports_paths_last(
        self, passed: bool, status: int, calls: list[Any], espalier: Espalier, recipe: Path
    ) -> None:
        calls[0](passed)
        ended = espalier("run", recipe, "--model", "owner/model", "--name", "small")
        assert ended.status == status
        assert ended.printed.splitlines()[0] == "the table"
        assert ended.printed.splitlines()[-2:] == ["home/runs/one/report.html", "home/runs/one/report.json"]

    def test_is_given_the_recipe_with_its_overrides(self, calls: list[Any], espalier: Espalier, recipe: Path) -> None:
        overrides = ("--set", "methods.trsp.ratio=0.5", "--set", "calibration.seed=7")
        espalier("run", recipe, "--model", "owner/model", "--name", "small", *overrides, "--home", "here")
        given, model, name, home, *_ = calls[-1]
        assert (given.methods.chosen[0].asked("layers"), given.calibration.seed) == (0.5, 7)
        assert (model, name, home) == ("owner/model", "small", Path("here"))

    def test_takes_a_shipped_recipe_by_its_name(self, calls: list[Any], espalier: Espalier) -> None:
        espalier("run", "sleb", "--model", "owner/model", "--name", "small")
        assert calls[-1][0] == load_recipe(RECIPES / "sleb.yaml")

    def test_whose_stage_broke_says_so_and_that_the_rest_is_kept(
        self, calls: list[Any], espalier: Espalier, recipe: Path
    ) -> None:
        calls[0](error=StageFailed("prune: VerificationError: other logits (the whole log: log.txt)"))
        ended = espalier("run", recipe, "--model", "owner/model", "--name", "small")
        assert ended.status == 1
        assert ended.told == (
            "espalier: prune: VerificationError: other logits (the whole log: log.txt); "
            "finished outputs are kept, and the same command continues from there\n"
        )

    def test_a_fault_of_ours_keeps_its_traceback(
        self, calls: list[Any], monkeypatch: pytest.MonkeyPatch, recipe: Path
    ) -> None:
        calls[0](error=ZeroDivisionError())
        monkeypatch.setattr(sys, "argv", ["espalier", "run", str(recipe), "--model", "owner/model", "--name", "small"])
        with pytest.raises(ZeroDivisionError):
            cli.main()


class TestARecipesName:
    def test_is_a_file_that_is_there_before_a_shipped_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_recipe("trsp") == find_recipe("trsp.yaml") == RECIPES / "trsp.yaml"
        Path("trsp.yaml").touch()
        assert find_recipe("trsp.yaml") == Path("trsp.yaml")
        assert find_recipe("other") == Path("other")

    def test_is_listed_with_what_it_does(self, espalier: Espalier) -> None:
        ended = espalier("recipes")
        assert ended.status == 0
        for method in known_methods():
            assert str(RECIPES / f"{method}.yaml") in ended.printed


def test_a_name_that_no_model_has_is_not_promoted(espalier: Espalier) -> None:
    ended = espalier("promote", "it's")
    assert (ended.status, len(ended.told.splitlines())) == (1, 1)


def test_half_an_s3_is_refused(espalier: Espalier, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    ended = espalier("run", recipe, "--model", "owner/model", "--name", "small", "--home", "home")
    assert ended.status == 1
    assert "ESPALIER_BUCKET is not set: name the bucket, or unset AWS_ENDPOINT_URL_S3" in ended.told


class TestACompare:
    """What every cell would be refused for is refused before anything is started."""

    @pytest.fixture
    def refusal(self, espalier: Espalier, recipe: Path, release: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def refusal(*arguments: object, model: object = release) -> str:
            monkeypatch.setattr(
                "pipeline.services.embedded.services", lambda home: pytest.fail("services were started")
            )
            ended = espalier("compare", recipe, "--model", model, "--home", "home", *arguments)
            assert (ended.status, ended.printed, Path("home").exists()) == (1, "", False)
            (sentence,) = ended.told.splitlines()
            return sentence.removeprefix("espalier: ")

        return refusal

    def test_of_ratios_that_all_leave_no_layer(self, refusal: Callable[..., str]) -> None:
        assert refusal("--ratios", "0.95,0.99").startswith("methods.trsp.ratio 0.95 removes 4 of the model's 4 layers")

    def test_of_no_release(self, refusal: Callable[..., str]) -> None:
        assert refusal(model="./nothing").startswith("nothing does not exist: name the folder")

    def test_with_seeds_that_are_no_numbers(self, refusal: Callable[..., str]) -> None:
        said = refusal("--seeds", "0,1.5")
        assert said == "--seeds is '0,1.5': write whole numbers with commas between them, such as --seeds 0,1"

    def test_side_by_side_on_this_machine(self, refusal: Callable[..., str]) -> None:
        assert refusal("--parallel", "2").startswith(
            "--parallel is for --on kubeflow: with --on local the cells run one"
        )

    def test_on_a_cluster_with_an_image_that_may_change(self, refusal: Callable[..., str]) -> None:
        assert "'espalier:cpu' has no digest" in refusal("--on", "kubeflow", "--image", "espalier:cpu")

    def test_whose_cells_do_not_fit_on_the_disk(
        self, refusal: Callable[..., str], release: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = (release / "model.safetensors").stat().st_size
        # The release, and for each of two ratios a regularised model, a pruned one and a control.
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=6.5 * size))
        assert refusal("--ratios", "0.25,0.5").startswith("home needs ")


def test_every_verb_shows_its_help(espalier: Espalier) -> None:
    verbs = ("run", "compare", "compile", "demo", "recipes", "services", "schedule", "watch", "why")
    for verb in (*verbs, "models", "diff", "promote", "rollback", "manifest", "serve"):
        assert espalier(verb, "--help").status == 0


def test_reasons_for_one_source_are_not_for_a_list(espalier: Espalier, tmp_path: Path) -> None:
    ended = espalier("watch", "--once", str(tmp_path / "sources.yaml"), "--recompress-on", "recipe")
    assert ended.status == 1
    assert "--recompress-on is for --source" in ended.told
