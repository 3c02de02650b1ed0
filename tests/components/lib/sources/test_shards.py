"""Texts that are read where they lie: which files they are, and what is read of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.lib.errors import Refusal
from components.lib.recipe.schema import Corpus
from components.lib.sources.shards import Shards, list_shards, row_groups
from components.lib.store.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def corpus(store: Store, tmp_path: Path) -> Corpus:
    """Three files of four documents, each a row group; a document is named after its file and its place."""
    (tmp_path / "corpus/deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        rows = pa.table({"text": [f"{name}{row}" for row in range(4)]})
        pq.write_table(rows, tmp_path / f"corpus/{name}.parquet", row_group_size=1)
    (tmp_path / "corpus/README.md").write_text("A corpus.")
    store.put(tmp_path / "corpus", "corpus")
    return Corpus(path=store.uri("corpus/"), stream=True)


class TestOnS3:
    def test_the_parquet_files_of_a_folder_are_listed(self, corpus: Corpus, store: Store) -> None:
        shards = list_shards(corpus, store)
        assert [file.uri for file in shards.files] == [
            store.uri(f"corpus/{name}.parquet") for name in ("a", "b", "deep/c")
        ]
        assert all(file.etag and file.size > 100 for file in shards.files)

    def test_a_folder_without_one_is_refused(self, store: Store) -> None:
        store.write_text("notes/web.txt", "words")
        with pytest.raises(Refusal, match=r"holds no \.parquet file, and stream is true: write the text as parquet"):
            list_shards(Corpus(path=store.uri("notes"), stream=True), store)

    def test_every_row_group_comes_once_and_the_first_of_each_file_before_the_second_of_any(
        self, corpus: Corpus, store: Store
    ) -> None:
        documents = [next(group) for group in row_groups(list_shards(corpus, store), store, seed=0)]
        assert len(set(documents)) == 12
        assert all(len({one[:-1] for one in documents[start : start + 3]}) == 3 for start in (0, 3, 6, 9))

    def test_the_seed_decides_the_order(self, corpus: Corpus, store: Store) -> None:
        shards = list_shards(corpus, store)
        orders = [[next(group) for group in row_groups(shards, store, seed)] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]

    def test_nothing_is_read_of_a_file_before_its_turn(self, corpus: Corpus, store: Store) -> None:
        shards = list_shards(corpus, store)
        lost = shards.files[1].model_copy(update={"uri": store.uri("corpus/lost.parquet")})
        groups = row_groups(Shards(field="text", files=(shards.files[0],) * 1 + (lost,)), store, seed=0)
        read = []
        with pytest.raises(Refusal, match="lost"):
            read += [next(group) for group in groups]
        assert len(read) <= 1


class TestOnTheHub:
    @pytest.fixture
    def files(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
        """Stands in for the Hub, which cannot be reached from here: the files of each split."""
        files = {"train": [f"hf://datasets/owner/data@{COMMIT}/data/train-{number}.parquet" for number in range(2)]}
        monkeypatch.setattr(
            huggingface_hub,
            "HfApi",
            lambda: SimpleNamespace(dataset_info=lambda name, revision: SimpleNamespace(sha=COMMIT)),
        )

        def builder(name: str, config: str | None, revision: str) -> Any:
            assert revision == COMMIT
            return SimpleNamespace(config=SimpleNamespace(data_files=files))

        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: SimpleNamespace(info=lambda uri: {"size": 7}))
        return files

    def test_the_parquet_files_of_a_split_are_listed_with_the_commit(self, files: dict[str, list[str]]) -> None:
        shards = list_shards(Corpus(hub="owner/data", field="body", stream=True), None)  # type: ignore[arg-type]
        assert shards.field == "body"
        assert [(file.uri, file.size, file.etag) for file in shards.files] == [(uri, 7, "") for uri in files["train"]]

    def test_a_data_set_in_another_format_is_refused_with_the_revision_that_is_in_parquet(
        self, files: dict[str, list[str]]
    ) -> None:
        files["train"] = ["hf://datasets/owner/data/c4.json.gz"]
        with pytest.raises(Refusal, match="set revision to refs/convert/parquet"):
            list_shards(Corpus(hub="owner/data", stream=True), None)  # type: ignore[arg-type]
