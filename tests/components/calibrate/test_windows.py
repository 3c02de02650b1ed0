"""Calibrate leaves windows of the text, and tells what they were drawn from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from components.calibrate import windows as work
from components.calibrate.windows import calibrate
from components.lib.errors import Refusal, Unavailable
from components.lib.recipe.schema import Calibration, Corpus
from components.lib.sources.shards import SHARDS, list_shards
from components.lib.store.store import Store
from components.lib.training.journal import Silent
from components.lib.training.windows import training_windows
from components.lib.transformer.text import token_stream
from tests.components.lib.transformer import zoo

ROWS = [" ".join(f"w{3 + (row * word) % 90}" for word in range(1, 101)) for row in range(1, 11)]
"""Ten documents of 100 tokens."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    zoo.release(zoo.SPECIMENS[0].model(layers=2), folder / "model")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in ROWS))
    return folder


def settings(**fields: object) -> Calibration:
    data = {"path": "rows.jsonl", "field": "body"}
    return Calibration.model_validate({"data": data, "samples": 5, "length": 16, "seed": 3} | fields)


def draw(release: Path, text: Path, out: Path, **fields: object) -> torch.Tensor:
    out.mkdir()
    calibrate(release, text, calibration=settings(**fields), out=out, journal=Silent())
    return load_file(out / "windows.safetensors")["windows"]


def test_windows_are_stretches_of_the_text_in_the_models_tokens(release: Path, text: Path, tmp_path: Path) -> None:
    windows = draw(release, text, tmp_path / "out")
    assert windows.dtype == torch.int32
    assert windows.shape == (5, 16)
    stretches = token_stream(ROWS, zoo.tokenizer()).unfold(0, 16, 1)  # every stretch of 16 tokens
    for window in windows:
        assert (stretches == window).all(dim=1).any()


def test_what_they_were_drawn_from_is_told(release: Path, text: Path, tmp_path: Path) -> None:
    draw(release, text, tmp_path / "out")
    assert json.loads((tmp_path / "out/calibration.json").read_text()) == {
        "documents": 10,
        "tokens": 1000,
        "windows_possible": 62,
        "samples": 5,
        "length": 16,
        "seed": 3,
    }


def test_the_seed_decides(release: Path, text: Path, tmp_path: Path) -> None:
    first = draw(release, text, tmp_path / "first")
    assert torch.equal(first, draw(release, text, tmp_path / "again"))
    assert not torch.equal(first, draw(release, text, tmp_path / "other", seed=4))


def test_text_too_short_is_refused_with_the_windows_it_gives(release: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="asks for 63 windows of 16 tokens and the text's 1000 tokens give 62"):
        draw(release, text, tmp_path / "out", samples=63)
    assert not any((tmp_path / "out").iterdir())


class TestForTheTrainingsAlone:
    """Further windows, in files."""

    @pytest.fixture(autouse=True)
    def files_of_four_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(work, "_FILE", 4 * 16)

    def test_they_follow_the_draw_of_the_others(self, release: Path, text: Path, tmp_path: Path) -> None:
        all_ = draw(release, text, tmp_path / "all", samples=15)
        some = draw(release, text, tmp_path / "out", samples=5, training_samples=10)
        further = training_windows(tmp_path / "out", some)
        assert torch.equal(some, all_[:5])
        assert torch.equal(further[torch.arange(10)], all_[5:])

    def test_each_file_is_sent_when_it_is_written(self, release: Path, text: Path, tmp_path: Path) -> None:
        out, sent = tmp_path / "out", list[str]()

        def send(path: Path) -> None:
            sent.append(path.name)
            path.unlink()

        out.mkdir()
        calibrate(release, text, calibration=settings(training_samples=10), out=out, journal=Silent(), send=send)
        assert sent == [f"training-0000{number}.safetensors" for number in range(3)]
        assert {path.name for path in out.iterdir()} == {"windows.safetensors", "training.json", "calibration.json"}


def parquet(rows: list[str], file: Path, field: str = "body", group: int = 5) -> Path:
    """Write documents into a parquet file, some in a row group."""
    pq.write_table(pa.table({field: rows, "other": [0] * len(rows)}), file, row_group_size=group)
    return file


class TestFromWhereItLies:
    """Windows of parquet files on S3, which are not copied."""

    @pytest.fixture
    def corpus(self, store: Store, tmp_path: Path) -> Corpus:
        """Four files of ten documents, in row groups of five."""
        (tmp_path / "corpus").mkdir()
        for number in range(4):
            rows = [
                " ".join(f"w{3 + (number * 7 + row * word) % 90}" for word in range(1, 101)) for row in range(1, 11)
            ]
            parquet(rows, tmp_path / f"corpus/part-{number}.parquet")
        store.put(tmp_path / "corpus", "corpus")
        return Corpus(path=store.uri("corpus"), field="body", stream=True)

    def listed(self, corpus: Corpus, store: Store, folder: Path) -> Path:
        folder.mkdir()
        (folder / SHARDS).write_text(list_shards(corpus, store).model_dump_json())
        return folder

    def test_windows_are_stretches_of_many_files(
        self, release: Path, corpus: Corpus, store: Store, tmp_path: Path
    ) -> None:
        windows = draw(release, self.listed(corpus, store, tmp_path / "text"), tmp_path / "out", samples=24)
        found = set()
        for number in range(4):
            rows = pq.read_table(tmp_path / f"corpus/part-{number}.parquet")["body"].to_pylist()
            stretches = token_stream(rows, zoo.tokenizer()).unfold(0, 16, 1)
            found |= {(number, index) for index, one in enumerate(windows) if (stretches == one).all(dim=1).any()}
        assert {index for _, index in found} == set(range(24))
        assert {number for number, _ in found} == {0, 1, 2, 3}
        assert len({tuple(window.tolist()) for window in windows}) == 24

    def test_the_seed_decides(self, release: Path, corpus: Corpus, store: Store, tmp_path: Path) -> None:
        text = self.listed(corpus, store, tmp_path / "text")
        first = draw(release, text, tmp_path / "first")
        assert torch.equal(first, draw(release, text, tmp_path / "again"))
        assert not torch.equal(first, draw(release, text, tmp_path / "other", seed=4))

    def test_what_they_were_drawn_from_is_told(
        self, release: Path, corpus: Corpus, store: Store, tmp_path: Path
    ) -> None:
        draw(release, self.listed(corpus, store, tmp_path / "text"), tmp_path / "out")
        told = json.loads((tmp_path / "out/calibration.json").read_text())
        size = sum(path.stat().st_size for path in (tmp_path / "corpus").iterdir())
        assert told == {"files": 4, "bytes": size, "samples": 5, "length": 16, "seed": 3}

    def test_too_short_a_text_is_refused_with_the_windows_it_gives(
        self, release: Path, corpus: Corpus, store: Store, tmp_path: Path
    ) -> None:
        text = self.listed(corpus, store, tmp_path / "text")
        with pytest.raises(Refusal, match=r"ask for 300 windows of 16 tokens and the text gives \d+: lower"):
            draw(release, text, tmp_path / "out", samples=200, training_samples=100)

    def test_a_file_that_changed_since_the_run_was_pinned_is_refused(
        self, release: Path, corpus: Corpus, store: Store, tmp_path: Path
    ) -> None:
        text = self.listed(corpus, store, tmp_path / "text")
        parquet(["w3 w4"] * 10, tmp_path / "corpus/part-1.parquet")
        time.sleep(1)  # the embedded server has no ETags, and tells the time of a change in seconds
        store.send(tmp_path / "corpus", "corpus", "part-1.parquet")
        with pytest.raises(Unavailable, match=r"part-1\.parquet was changed after it was listed: start a new run"):
            draw(release, text, tmp_path / "out")

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda file: file.write_bytes(b"no parquet" * 10), "cannot be read as parquet"),
            (
                lambda file: parquet(["w3"], file, field="text"),
                "has no column 'body': set 'field' to one of its columns",
            ),
            (lambda file: pq.write_table(pa.table({"body": [1, 2]}), file), "has int in column 'body' of row 1"),
        ],
    )
    def test_a_file_that_holds_no_text_is_refused(
        self, damage: Any, said: str, release: Path, store: Store, tmp_path: Path
    ) -> None:
        (tmp_path / "corpus").mkdir()
        damage(tmp_path / "corpus/part-0.parquet")
        store.put(tmp_path / "corpus", "corpus")
        text = self.listed(Corpus(path=store.uri("corpus"), field="body", stream=True), store, tmp_path / "text")
        with pytest.raises(Refusal, match=said):
            draw(release, text, tmp_path / "out")
