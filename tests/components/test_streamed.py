"""From a text that is read where it lies to a training that reads it file by file: as if all had been on one disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components.calibrate import windows as calibration
from components.calibrate.stage import STAGE as CALIBRATE
from components.lib.recipe.loading import parse_recipe
from components.lib.store.artifacts import Reference
from components.lib.store.store import Store
from components.lib.training.journal import NoCheckpoints, Silent
from components.lib.transformer.selection import Selection
from components.pin.pin import pin_files
from components.regularize.regularize import regularize
from components.regularize.stage import STAGE as REGULARIZE
from tests.components.given import Given, weights

RECIPE = """
methods: {sleb: {ratio: 0.25}}
calibration: {data: {path: CORPUS, stream: true}, samples: 4, training_samples: 20, length: 16}
regularize: {steps: 6, batch_size: 4, learning_rate: 3e-3, precision: fp32, schedule: anneal}
evaluate: {perplexity: {test: "s3://bucket/test.txt"}, controls: []}
"""


def test_a_training_reads_the_windows_that_were_drawn_for_it(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_FILE", 7 * 16)  # three files
    store, given = Store.from_environment(), Given.lay(tmp_path / "given")
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        rows = [" ".join(f"w{3 + (number + row * word) % 90}" for word in range(60)) for row in range(8)]
        pq.write_table(pa.table({"text": rows}), tmp_path / f"corpus/{number}.parquet", row_group_size=4)
    store.put(tmp_path / "corpus", "corpus")
    recipe = parse_recipe(RECIPE.replace("CORPUS", store.uri("corpus")))
    pinned = pin_files(recipe, store, lambda path: "test.txt" not in str(path))
    release, selection = (str(store.put_content(folder, "given")) for folder in (given.release, given.selection))

    windows = CALIBRATE.run("one", pinned.to_yaml(), release=release)
    made = REGULARIZE.run("one", pinned.to_yaml(), release=release, windows=windows, selection=selection)

    whole = store.get(Reference.parse(windows), tmp_path / "windows")
    assert sorted(path.name for path in whole.glob("training-*")) == [f"training-0000{n}.safetensors" for n in range(3)]
    (tmp_path / "out").mkdir()
    regularize(
        given.release,
        whole,
        given.selection,
        regularize=recipe.regularize,
        out=tmp_path / "out",
        journal=Silent(),
        checkpoints=NoCheckpoints(),
    )
    there, here = weights(store.get(Reference.parse(made), tmp_path / "made")), weights(tmp_path / "out")
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert Selection.load(given.selection).removed == (1,)
    before = weights(given.release)
    assert any(not torch.equal(before[name], here[name]) for name in here)
