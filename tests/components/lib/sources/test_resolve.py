"""Where releases and texts come from: each source is one thing that does not change, or a refusal that says what to do."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from components.lib.errors import Refusal, Unavailable
from components.lib.recipe.schema import Text
from components.lib.sources.resolve import release_config, resolve_release, resolve_text
from components.lib.store.store import Store
from components.lib.tracking import client, registry

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class TestS3:
    @pytest.fixture
    def release(self, store: Store) -> str:
        store.write_text("model/config.json", "{}")
        store.write_text("model/model.safetensors", "weights")
        return store.uri("model")

    def test_is_pinned_by_what_its_listing_says(self, release: str, store: Store) -> None:
        first = resolve_release(release, store)
        assert first.source == release
        assert resolve_release(release, store).prefix == first.prefix
        store.write_text("model/config.json", "{ }")
        assert resolve_release(release, store).prefix != first.prefix

    def test_changes_with_a_file_more(self, release: str, store: Store) -> None:
        first = resolve_release(release, store)
        store.write_text("model/README.md", "A model.")
        assert resolve_release(release, store).revision != first.revision

    def test_is_fetched_whole(self, release: str, store: Store, tmp_path: Path) -> None:
        folder = resolve_release(release, store).fetch(tmp_path / "copy")
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}

    def test_holds_texts_too(self, store: Store, tmp_path: Path) -> None:
        store.write_text("web.txt", "words")
        folder = resolve_text(Text(path=store.uri("web.txt")), store).fetch(tmp_path / "copy")
        assert (folder / "web.txt").read_text() == "words"

    def test_that_names_nothing_is_refused(self, store: Store) -> None:
        with pytest.raises(Unavailable, match=r"nothing names no object and no prefix with objects: check the address"):
            resolve_release(store.uri("nothing"), store)


class TestTheRegistry:
    @pytest.fixture
    def name(self) -> str:
        return f"model-{uuid.uuid4().hex}"

    @pytest.fixture
    def store(self, environment: dict[str, str]) -> Store:
        return Store.from_environment()

    @pytest.fixture
    def registered(self, name: str, store: Store) -> str:
        """Version 1, on S3, is champion; version 2 lies elsewhere."""
        store.write_text("model/config.json", "{}")
        client.client().create_registered_model(name)
        client.client().create_model_version(name, store.uri("model"))
        client.client().create_model_version(name, "gs://elsewhere/model")
        registry.set_alias(name, "champion", "1")
        return name

    def test_is_resolved_to_the_version_that_an_alias_names(
        self, registered: str, store: Store, tmp_path: Path
    ) -> None:
        resolved = resolve_release(f"models:/{registered}@champion", store)
        assert resolved.source == f"models:/{registered}/1"
        assert resolved.prefix == resolve_release(f"models:/{registered}/1", store).prefix
        assert (resolved.fetch(tmp_path / "copy") / "config.json").read_text() == "{}"

    def test_refuses_an_alias_that_nobody_set(self, registered: str, store: Store) -> None:
        with pytest.raises(Refusal, match=rf"'{registered}' has no alias 'best': set it, or name a version"):
            resolve_release(f"models:/{registered}@best", store)

    def test_refuses_a_version_that_is_not_there(self, registered: str, store: Store) -> None:
        with pytest.raises(Refusal, match=rf"no version 9 of {registered}: it has 1 \(champion\), 2"):
            resolve_release(f"models:/{registered}/9", store)

    @pytest.mark.parametrize("source", ["models:/name", "models:/name/latest", "models:/"])
    def test_refuses_what_names_no_version(self, source: str, store: Store) -> None:
        with pytest.raises(Refusal, match="names no registered version: write models:/name@alias or models:/name/1"):
            resolve_release(source, store)

    def test_refuses_a_version_that_is_not_on_s3(self, registered: str, store: Store) -> None:
        with pytest.raises(Refusal, match=r"lies at gs://elsewhere/model, not on S3: register its s3:// prefix"):
            resolve_release(f"models:/{registered}/2", store)


class Hub:
    """Stands in for the Hub, which cannot be reached from here: one model, one data set."""

    def __init__(self, model_type: str = "llama") -> None:
        self.model_type = model_type
        self.asked: list[Any] = []
        self.error: Exception | None = None

    def _answer(self, *asked: Any) -> Any:
        self.asked.append(asked)
        if self.error:
            raise self.error
        return SimpleNamespace(sha=COMMIT)

    def model_info(self, repository: str, revision: str | None) -> Any:
        return self._answer("model", repository, revision)

    def dataset_info(self, repository: str, revision: str | None) -> Any:
        return self._answer("data set", repository, revision)

    def hf_hub_download(self, repository: str, name: str, revision: str, local_dir: Path) -> str:
        self._answer("file", name, revision)
        local_dir.mkdir(parents=True)
        (local_dir / name).write_text(json.dumps({"model_type": self.model_type, "num_hidden_layers": 2}))
        return str(local_dir / name)

    def snapshot_download(self, repository: str, revision: str, local_dir: Path, **patterns: list[str]) -> None:
        self._answer("snapshot", revision, patterns)
        if patterns["allow_patterns"][0].endswith(".gguf"):
            (local_dir / "Q8_0").mkdir(parents=True)
            for name in {"Q8_0/model.gguf", "README.md"} & set(patterns["allow_patterns"]):
                (local_dir / name).write_text("weights")
            return
        (local_dir / ".cache/huggingface").mkdir(parents=True)
        (local_dir / "model.safetensors").write_text("weights")

    def load_dataset(self, name: str, config: str | None, split: str, revision: str) -> datasets.Dataset:
        self._answer("rows", name, config, split, revision)
        return datasets.Dataset.from_dict({"body": ["one", "", "three"], "label": [0, 1, 0]})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


NO_STORE: Any = None


class TestTheHub:
    @pytest.mark.parametrize(("source", "asked"), [("owner/model", None), ("owner/model@v1", "v1")])
    def test_is_pinned_to_the_commit_that_a_revision_is_now(self, source: str, asked: str | None, hub: Hub) -> None:
        resolved = resolve_release(source, NO_STORE)
        assert hub.asked == [("model", "owner/model", asked)]
        assert (resolved.source, resolved.revision) == ("owner/model", COMMIT)

    def test_gives_the_commits_files_and_no_pickles(self, hub: Hub, tmp_path: Path) -> None:
        folder = resolve_release("owner/model", NO_STORE).fetch(tmp_path / "copy")
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        _, revision, patterns = hub.asked[-1]
        assert revision == COMMIT
        taken = list(
            huggingface_hub.utils.filter_repo_objects(
                [
                    *("config.json", "model.safetensors", "tokenizer.model", "README.md", "LICENSE", "vocab.txt"),
                    *(
                        "additional_chat_templates/tools.jinja",
                        "pytorch_model.bin",
                        "modeling.py",
                        "flax_model.msgpack",
                    ),
                    *("consolidated.safetensors", "onnx/model.safetensors", "original/consolidated.00.pth", "tf.h5"),
                ],
                **patterns,
            )
        )
        assert taken == [
            *("config.json", "model.safetensors", "tokenizer.model", "README.md", "LICENSE", "vocab.txt"),
            "additional_chat_templates/tools.jinja",
        ]

    def test_a_family_that_is_not_known_is_refused_before_the_weights_travel(self, hub: Hub, tmp_path: Path) -> None:
        hub.model_type = "reformer"
        with pytest.raises(Refusal, match="reformer"):
            resolve_release("owner/model", NO_STORE).fetch(tmp_path / "copy")
        assert [asked[0] for asked in hub.asked] == ["model", "file"]

    def test_a_gguf_file_is_named_by_its_path_in_a_repository(self, hub: Hub, tmp_path: Path) -> None:
        """Its card travels; the repository's other files do not."""
        resolved = resolve_release("owner/model/Q8_0/model.gguf@v1", NO_STORE)
        assert hub.asked == [("model", "owner/model", "v1")]
        assert (resolved.source, resolved.revision) == ("owner/model/Q8_0/model.gguf", COMMIT)
        folder = resolved.fetch(tmp_path / "copy")
        assert {path.name for path in folder.iterdir() if path.is_file()} == {"model.gguf", "README.md"}
        with pytest.raises(Refusal, match=r"no file Q4_0/model\.gguf: check its path"):
            resolve_release("owner/model/Q4_0/model.gguf", NO_STORE).fetch(tmp_path / "other")
        with pytest.raises(Refusal, match="whose settings are read when it is fetched"):
            release_config("owner/model/Q8_0/model.gguf")

    def test_a_data_set_becomes_the_rows_of_its_column(self, hub: Hub, tmp_path: Path) -> None:
        text = Text(hub="owner/data", config="raw", split="test", field="body")
        resolved = resolve_text(text, NO_STORE)
        assert (resolved.source, resolved.revision) == ("owner/data/raw/test/body", COMMIT)
        folder = resolved.fetch(tmp_path / "copy")
        assert hub.asked[-1] == ("rows", "owner/data", "raw", "test", COMMIT)
        made = datasets.Dataset.from_parquet(str(folder / "text.parquet"), cache_dir=str(tmp_path / "cache"))
        assert made.to_dict() == {"body": ["one", "", "three"]}

    def test_a_data_sets_parts_are_other_texts(self, hub: Hub) -> None:
        def prefix(**part: str) -> str:
            return resolve_text(Text(hub="owner/data", **part), NO_STORE).prefix

        assert len({prefix(), prefix(config="raw"), prefix(split="test"), prefix(field="body")}) == 4

    def test_a_column_that_is_not_there_is_refused_with_those_that_are(self, hub: Hub, tmp_path: Path) -> None:
        resolved = resolve_text(Text(hub="owner/data"), NO_STORE)
        with pytest.raises(Refusal, match="no column 'text': set field to one of body, label"):
            resolved.fetch(tmp_path / "copy")


def _answered(error: Callable[..., Exception], status: int = 404) -> Exception:
    return error("said", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "passes", "said"),
    [
        (errors.HFValidationError("said"), False, "is neither a folder here nor a Hub id: check the path, or write"),
        (_answered(errors.GatedRepoError, 403), True, "is gated: accept its terms on the Hub and set HF_TOKEN"),
        (_answered(errors.RevisionNotFoundError), False, "has no such revision: name a branch, a tag or a commit"),
        (_answered(errors.RepositoryNotFoundError), True, "the Hub has no release owner/model@v1: check the spelling"),
        (
            _answered(errors.RemoteEntryNotFoundError),
            False,
            r"needed \(said\): name a .* checkpoint, or a GGUF file in it as owner/name/FILE\.gguf",
        ),
        (_answered(errors.HfHubHTTPError, 500), True, "the Hub did not answer for the release owner/model@v1"),
        (httpx2.ConnectError("said"), True, r"\(ConnectError\): check the connection, or name a folder or file"),
        (TimeoutError(), True, r"\(TimeoutError\): check the connection"),
    ],
)
def test_what_the_hub_says_is_told_in_one_sentence(error: Exception, passes: bool, said: str, hub: Hub) -> None:
    hub.error = error
    with pytest.raises(Refusal, match=said) as refused:
        resolve_release("owner/model@v1", NO_STORE)
    assert isinstance(refused.value, Unavailable) == passes
    assert "\n" not in str(refused.value)
