"""Whatever the method, the choice is as much as the recipe's ratio asks for, and is left where the next stages look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from components.learn_gates.choose import choose
from components.lib.errors import Refusal
from components.lib.recipe.schema import Dress, Gates, Target, methods
from components.lib.transformer.selection import Selection
from tests.components.given import Given, digest
from tests.components.lib.training.tiny import Written

GATES = Gates(steps=2, batch_size=4, shortlist=2)
OF_LAYERS = [method for method in methods() if method != "dress"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given.lay(tmp_path_factory.mktemp("run"))


def work(given: Given, out: Path, method: str | Sequence[str], layers: float = 0.5, **dress: Any) -> Selection:
    out.mkdir()
    choose(
        given.release,
        given.windows,
        method=method,
        target=Target(ratio=layers),
        gates=GATES,
        dress=Dress(**dress),
        out=out,
        journal=Written(),
    )
    return Selection.load(out)


@pytest.mark.parametrize("method", OF_LAYERS)
def test_every_method_of_layers_leaves_a_selection(method: str, given: Given, tmp_path: Path) -> None:
    before = digest(given.release)
    selection = work(given, tmp_path / "out", method)
    assert selection.method == method
    assert len(set(selection.removed)) == 2
    assert set(selection.removed) <= set(range(4))
    assert selection.removed == tuple(sorted(selection.order))
    assert all(len(scores) == 4 for scores in selection.scores.values())
    assert not selection.channels
    assert digest(given.release) == before


def test_dress_leaves_a_selection_of_channels(given: Given, tmp_path: Path) -> None:
    before = digest(given.release)
    selection = work(given, tmp_path / "out", "dress", axes=("hidden", "ffn", "heads"))
    assert (selection.method, selection.axis, selection.removed) == ("dress", "hidden+ffn+heads", ())
    assert [selection.channels.count(axis) for axis in ("hidden", "ffn", "heads")] == [16, 24, 1]
    assert digest(given.release) == before


def test_two_methods_leave_one_selection_of_both(given: Given, tmp_path: Path) -> None:
    layers = work(given, tmp_path / "layers", "shortgpt", layers=0.25)
    both = work(given, tmp_path / "both", ("shortgpt", "dress"), layers=0.25, ratio=0.5)
    assert (both.method, both.axis) == ("shortgpt+dress", "layers+ffn")
    assert (both.removed, both.order, both.scores) == (layers.removed, layers.order, layers.scores)
    assert [len(gone) for gone in both.channels.ffn] == [0 if layer in both.removed else 24 for layer in range(4)]


def test_trsp_leaves_the_gates_on_their_way_too(given: Given, tmp_path: Path) -> None:
    work(given, tmp_path / "out", "trsp")
    assert {"selection.json", "trajectory.jsonl", "gates.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.25, 1), (0.4, 2), (0.75, 3)])
def test_the_ratio_is_rounded_to_whole_layers_and_at_least_one(
    ratio: float, count: int, given: Given, tmp_path: Path
) -> None:
    assert len(work(given, tmp_path / "out", "shortgpt", ratio).removed) == count


def test_a_ratio_that_leaves_no_layer_is_refused(given: Given, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"target\.ratio 0\.9 removes 4 of the model's 4 layers"):
        work(given, tmp_path / "out", "shortgpt", layers=0.9)
    assert list((tmp_path / "out").iterdir()) == []
