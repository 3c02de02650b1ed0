"""Whatever the method, the choice is as many layers as the recipe's ratio asks for, and is left where the next stages look."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.errors import Refusal
from components.learn_gates.choose import choose
from components.recipe import Gates, Target, methods
from components.transformer.selection import Selection
from tests.components.given import Given, digest
from tests.components.training.tiny import Written

GATES = Gates(steps=2, batch_size=4, shortlist=2)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given.lay(tmp_path_factory.mktemp("run"))


def work(given: Given, out: Path, method: str, ratio: float = 0.5) -> Selection:
    out.mkdir()
    choose(
        given.release, given.windows, method=method, target=Target(ratio=ratio), gates=GATES, out=out, journal=Written()
    )
    return Selection.load(out)


@pytest.mark.parametrize("method", methods())
def test_every_method_leaves_a_selection(method: str, given: Given, tmp_path: Path) -> None:
    before = digest(given.release)
    selection = work(given, tmp_path / "out", method)
    assert selection.method == method
    assert len(set(selection.removed)) == 2
    assert set(selection.removed) <= set(range(4))
    assert selection.removed == tuple(sorted(selection.order))
    assert all(len(scores) == 4 for scores in selection.scores.values())
    assert digest(given.release) == before


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
        work(given, tmp_path / "out", "shortgpt", ratio=0.9)
    assert list((tmp_path / "out").iterdir()) == []
