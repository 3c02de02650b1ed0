"""What a run starts from is pinned: checked first, stored once, and free of what is no checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe, Text
from components.lib.sources.resolve import Resolved
from components.lib.store.store import Reference, Store
from components.lib.transformer.checkpoint import Checkpoint, PrunableCheckpoint
from components.pin import pin
from components.pin.pin import check_checkpoint, check_text, find_release, pin_folder, pin_release, pin_text
from tests.components.lib.transformer import qwen35, zoo
from tests.components.lib.transformer.test_dequantise import in_fp8
from tests.components.lib.transformer.test_gguf import specimen, write_gguf
from tests.components.lib.transformer.wrapped import WRAPPED


def recipe(ratio: float = 0.25, calibration: int = 32, evaluate: int = 32, **fields: object) -> Recipe:
    return Recipe.model_validate(
        {
            "methods": {"trsp": {"ratio": ratio}},
            "calibration": {"data": "train.txt", "length": calibration},
            "evaluate": {"perplexity": {"test": "test.txt"}, "length": evaluate, "speed": {"enabled": False}},
        }
        | fields
    )


def test_the_text_model_alone_is_pinned_if_the_recipe_asks_for_it(tmp_path: Path, store: Store) -> None:
    gemma = next(wrapped for wrapped in WRAPPED if wrapped.model_type == "gemma3")
    folder = zoo.release(gemma.model(6), tmp_path / "release")
    whole, alone = pin_folder(folder, recipe(), store), pin_folder(folder, recipe(text_only=True), store)
    assert whole != alone
    assert store.manifest(alone).metadata["taken_out_of"] == "Gemma 3"
    assert "taken_out_of" not in store.manifest(whole).metadata
    assert find_release(str(folder), recipe(text_only=True), store) == alone
    config = json.loads((store.get(alone, tmp_path / "text") / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert pin_release(str(alone), recipe(text_only=True), store) == alone
    with pytest.raises(Refusal, match=r"text_only is true, but .* is a release with its other towers"):
        pin_release(str(whole), recipe(text_only=True), store)


NARROW = {"dress": {"ratio": 0.25}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.release(zoo.SPECIMENS[0].model(layers=4), tmp_path_factory.mktemp("release"), shard="60KB")


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A release in a folder, of several shards; a test may change it."""
    return Path(shutil.copytree(made, tmp_path / "release"))


@pytest.fixture
def edit(release: Path) -> Callable[..., None]:
    def edit(**fields: object) -> None:
        config = json.loads((release / "config.json").read_text())
        (release / "config.json").write_text(json.dumps(config | fields))

    return edit


def names(store: Store, reference: Reference) -> set[str]:
    return {file.name for file in store.manifest(reference).files}


def stored(store: Store) -> list[str]:
    return [*store.folders("releases"), *store.folders("texts")]


def no_fetch(folder: Path) -> Path:
    pytest.fail("fetched a second time")


STRAY = ("pytorch_model.bin", "training_args.bin", "modeling.py", "optimizer.pt", "consolidated.safetensors", ".env")


def test_a_release_in_fp8_is_pinned_in_bf16(tmp_path: Path, store: Store) -> None:
    """With its card, whose licence the candidate repeats; the lineage says that it was dequantised."""
    source = in_fp8(zoo.SPECIMENS[0], tmp_path / "fp8")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    reference = pin_folder(source, recipe(), store)
    assert store.manifest(reference).metadata == {"source": str(source), "revision": None, "dequantised": "fp8"}
    copy = store.get(reference, tmp_path / "copy") / "model"
    assert PrunableCheckpoint.open(copy).dtype == "bfloat16"
    assert (copy / "README.md").read_text() == (source / "README.md").read_text()
    assert find_release(str(source), recipe(), store) == reference


@pytest.mark.parametrize("named", ["the folder", "the file"])
def test_a_release_in_a_gguf_file_is_pinned_as_a_plain_checkpoint(named: str, tmp_path: Path, store: Store) -> None:
    """With its tokenizer; the lineage says what it was."""
    (tmp_path / "release").mkdir()
    file = write_gguf(specimen("llama").model(4), tmp_path / "release" / "model.gguf", quantised=True)
    source = file if named == "the file" else file.parent
    reference = pin_folder(source, recipe(), store)
    assert store.manifest(reference).metadata == {"source": str(source), "revision": None, "gguf": "Q8_0"}
    copy = store.get(reference, tmp_path / "copy") / "model"
    assert PrunableCheckpoint.open(copy).dtype == "bfloat16"
    assert (copy / "tokenizer.json").is_file()
    assert not list(copy.glob("*.gguf"))
    assert find_release(str(source), recipe(), store) == reference


def test_heads_that_a_gguf_file_loses_are_named_in_the_lineage(tmp_path: Path, store: Store) -> None:
    model = specimen("qwen3_5").model(4)
    file = write_gguf(model, tmp_path / "model.gguf", tensors=qwen35.head(model))
    made = store.manifest(pin_folder(file, recipe(), store)).metadata
    assert made["heads"] == ["blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight"]


def test_a_gguf_file_is_checked_before_it_is_unpacked(tmp_path: Path, store: Store) -> None:
    file = write_gguf(specimen("llama").model(4), tmp_path / "model.gguf")
    with pytest.raises(Refusal, match=r"calibration\.length is 4096, and the model reads 64 tokens at most"):
        check_checkpoint(file, recipe(calibration=4096))


class TestAFolder:
    def test_comes_back_as_the_checkpoint_it_was(self, release: Path, store: Store, tmp_path: Path) -> None:
        reference = pin_folder(release, recipe(), store)
        copy = store.get(reference, tmp_path / "copy") / "model"
        assert Checkpoint.open(copy).parameters == Checkpoint.open(release).parameters
        for file in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
            assert (copy / file).read_bytes() == (release / file).read_bytes()
        assert store.manifest(reference).metadata == {"source": str(release), "revision": None}

    def test_leaves_pickles_code_and_stray_files_behind(self, release: Path, store: Store) -> None:
        clean = names(store, pin_folder(release, recipe(), store))
        for file in STRAY:
            (release / file).write_bytes(b"\x80\x04.")
        (release / "runs").mkdir()
        (release / "runs/events.json").write_text("{}")
        assert names(store, pin_folder(release, recipe(), store)) == clean

    def test_is_stored_once_wherever_it_lies(self, release: Path, store: Store, tmp_path: Path) -> None:
        first = pin_folder(release, recipe(), store)
        assert pin_folder(Path(shutil.copytree(release, tmp_path / "other")), recipe(), store) == first
        assert len(stored(store)) == 1

    def test_of_links_is_stored_as_the_files_they_name(self, release: Path, store: Store, tmp_path: Path) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        for path in release.iterdir():
            (linked / path.name).symlink_to(path)
        assert pin_folder(linked, recipe(), store) == pin_folder(release, recipe(), store)


class TestARefusal:
    """Before a byte is uploaded."""

    @pytest.fixture
    def refused(self, release: Path, store: Store) -> Callable[..., str]:
        def refused(asked: Recipe | None = None) -> str:
            with pytest.raises(Refusal) as refusal:
                pin_folder(release, asked or recipe(), store)
            assert stored(store) == []
            return str(refusal.value)

        return refused

    def test_of_a_family_that_is_not_known(self, edit: Callable[..., None], refused: Callable[..., str]) -> None:
        edit(model_type="reformer")
        assert "reformer" in refused()

    def test_of_a_field_that_speaks_of_layers_and_is_not_known(
        self, edit: Callable[..., None], refused: Callable[..., str]
    ) -> None:
        edit(layer_scales=[1.0, 2.0, 3.0, 4.0])
        assert "layer_scales" in refused()

    def test_of_pickled_weights(self, release: Path, refused: Callable[..., str]) -> None:
        for path in release.glob("model*"):
            path.unlink()
        (release / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        assert "pickled weights only (pytorch_model.bin)" in refused()

    def test_of_a_folder_without_a_config(self, release: Path, refused: Callable[..., str]) -> None:
        (release / "config.json").unlink()
        assert refused() == f"{release} has no config.json: name the folder of a Hugging Face checkpoint"

    def test_of_a_ratio_that_leaves_no_layer(self, refused: Callable[..., str]) -> None:
        assert "methods.trsp.ratio 0.95 removes 4 of the model's 4 layers" in refused(recipe(ratio=0.95))

    @pytest.mark.parametrize(
        ("lengths", "field"), [({"calibration": 65}, "calibration.length"), ({"evaluate": 65}, "evaluate.length")]
    )
    def test_of_windows_that_the_model_cannot_read(
        self, lengths: dict[str, int], field: str, refused: Callable[..., str]
    ) -> None:
        said = refused(recipe(**{"calibration": 32, "evaluate": 32} | lengths))
        assert said == f"{field} is 65, and the model reads 64 tokens at most: set it to 64 or less"

    @pytest.mark.parametrize(
        ("dress", "said"),
        [
            ({"axes": ["heads"], "ratio": 0.2}, "of the 2 channels of the axis heads no number near 20% can go"),
            ({"axes": ["hidden"], "ratio": 0.25, "multiple": 32}, "of the 32 channels of the axis hidden no number"),
        ],
    )
    def test_of_channels_that_no_width_leaves(
        self, dress: dict[str, object], said: str, refused: Callable[..., str]
    ) -> None:
        assert said in refused(recipe(methods={"dress": dress}))
        assert said in refused(recipe(methods={"trsp": {"ratio": 0.25}, "dress": dress}))

    def test_of_a_tensor_whose_channels_are_not_known(self, release: Path, refused: Callable[..., str]) -> None:
        file = min(release.glob("*.safetensors"))
        save_file(load_file(file) | {"model.layers.0.mlp.router.weight": torch.zeros(4, 4096)}, file)
        index = json.loads((release / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.0.mlp.router.weight"] = file.name
        (release / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "the tensor model.layers.0.mlp.router.weight holds" in refused(
            recipe(methods={"dress": {"ratio": 0.25, "axes": ["hidden"]}})
        )

    def test_of_channels_of_a_mixture_of_experts(self, store: Store, tmp_path: Path) -> None:
        mixtral = next(specimen for specimen in zoo.SPECIMENS if specimen.name == "mixtral")
        folder = zoo.release(mixtral.model(layers=4), tmp_path / "mixtral")
        with pytest.raises(Refusal, match="a mixture of experts, from which whole layers can be removed"):
            pin_folder(folder, recipe(methods=NARROW), store)
        assert stored(store) == []

    def test_none_where_the_windows_fit(self, release: Path) -> None:
        assert check_checkpoint(release, recipe(calibration=64)).layers == 4


class TestAReleaseElsewhere:
    """Fetched by a resolved source, whatever its kind."""

    @pytest.fixture
    def fetched(self, release: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Let every source resolve to the release at one revision; it may be fetched once."""

        def fetched(revision: str = "r1", fetch: Callable[[Path], Path] | None = None) -> None:
            copy = fetch or (lambda folder: Path(shutil.copytree(release, folder)))
            monkeypatch.setattr(pin, "resolve_release", lambda source, store: Resolved(source, revision, copy))

        return fetched

    def test_is_snapshot_with_its_revision(self, store: Store, fetched: Callable[..., None]) -> None:
        fetched()
        reference = pin_release("owner/model", recipe(), store)
        assert store.manifest(reference).metadata == {"source": "owner/model", "revision": "r1"}
        assert "model/config.json" in names(store, reference)

    def test_is_fetched_once_a_revision(self, store: Store, fetched: Callable[..., None]) -> None:
        fetched()
        first = pin_release("owner/model", recipe(), store)
        fetched(fetch=no_fetch)
        assert pin_release("owner/model", recipe(), store) == first
        fetched(revision="r2")
        assert pin_release("owner/model", recipe(), store).uri != first.uri

    def test_leaves_pickles_and_stray_files_behind(
        self, release: Path, store: Store, fetched: Callable[..., None]
    ) -> None:
        for file in STRAY:
            (release / file).write_bytes(b"\x80\x04.")
        fetched()
        kept = names(store, pin_release("s3://elsewhere/model", recipe(), store))
        assert not {f"model/{file}" for file in STRAY} & kept

    def test_is_refused_before_it_is_stored(
        self, edit: Callable[..., None], store: Store, fetched: Callable[..., None]
    ) -> None:
        edit(model_type="reformer")
        fetched()
        with pytest.raises(Refusal, match="reformer"):
            pin_release("owner/model", recipe(), store)
        assert stored(store) == []

    def test_that_is_a_reference_is_pinned_already(self, release: Path, store: Store) -> None:
        reference = pin_folder(release, recipe(), store)
        assert pin_release(str(reference), recipe(), store) == reference

    def test_that_is_in_the_store_is_checked_against_this_recipe_too(
        self, store: Store, fetched: Callable[..., None]
    ) -> None:
        """It was stored for another one, and nothing but headers is fetched to see that this one cannot be applied."""
        fetched()
        reference = pin_release("owner/model", recipe(), store)
        fetched(fetch=no_fetch)
        for source in ("owner/model", str(reference)):
            with pytest.raises(Refusal, match=r"methods\.trsp\.ratio 0\.95 removes 4 of the model's 4 layers"):
                pin_release(source, recipe(ratio=0.95), store)
            with pytest.raises(Refusal, match=r"calibration\.length is 65, and the model reads 64 tokens at most"):
                pin_release(source, recipe(calibration=65), store)
            with pytest.raises(Refusal, match="of the axis heads no number near 20% can go"):
                pin_release(source, recipe(methods={"dress": {"axes": ["heads"], "ratio": 0.2}}), store)


class TestAText:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "a corpus.txt"
        path.write_text("Once upon a time.\n")
        return path

    def test_becomes_one_file_with_its_suffix(self, file: Path, store: Store, tmp_path: Path) -> None:
        reference = pin_text(Text(path=str(file)), store)
        assert (store.get(reference, tmp_path / "copy") / "text.txt").read_text() == "Once upon a time.\n"
        assert store.manifest(reference).metadata == {"source": str(file)}

    def test_is_named_by_its_content_alone(self, file: Path, store: Store) -> None:
        first = pin_text(Text(path=str(file)), store)
        other = file.rename(file.with_name("renamed.txt"))
        assert pin_text(Text(path=str(other), field="body"), store) == first

    def test_that_is_a_reference_is_pinned_already(self, store: Store) -> None:
        text = f"s3://bucket/texts/x@sha256:{'a' * 64}"
        assert str(pin_text(Text(path=text), store)) == text

    def test_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match=r"nothing\.txt is not a file here: check the path, or name an s3:// object"):
            check_text(str(tmp_path / "nothing.txt"))

    def test_of_another_kind_is_refused(self, file: Path) -> None:
        other = file.rename(file.with_suffix(".csv"))
        with pytest.raises(Refusal, match=r"ends in '\.csv': use one of \.txt, \.jsonl, \.parquet"):
            check_text(str(other))

    def test_on_s3_is_pinned_as_it_is_now(self, file: Path, store: Store, tmp_path: Path) -> None:
        store.write_text("corpora/web.txt", "first")
        text = Text(path=store.uri("corpora/web.txt"))
        first = pin_text(text, store)
        assert pin_text(text, store) == first
        store.write_text("corpora/web.txt", "second")
        second = pin_text(text, store)
        assert (store.get(first, tmp_path / "first") / "text.txt").read_text() == "first"
        assert (store.get(second, tmp_path / "second") / "text.txt").read_text() == "second"

    @pytest.mark.parametrize(
        ("objects", "said"),
        [
            (["web.csv"], r"ends in '\.csv': use one of"),
            (["a.txt", "b.txt"], r"corpora holds 2 files: name one of them"),
        ],
    )
    def test_on_s3_of_another_kind_or_of_several_files_is_refused(
        self, objects: list[str], said: str, store: Store
    ) -> None:
        for name in objects:
            store.write_text(f"corpora/{name}", "text")
        with pytest.raises(Refusal, match=said):
            pin_text(Text(path=store.uri("corpora")), store)
        assert stored(store) == []
