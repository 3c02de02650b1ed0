"""Whatever the method, the choice is as much as the recipe's ratio asks for, and is left where the next stages look."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.learn_gates.choose import choose, select
from components.lib.errors import Refusal
from components.lib.methods import LayerMethod, Method, known_methods
from components.lib.methods.dress import Dress
from components.lib.methods.last import Last
from components.lib.methods.shortgpt import ShortGPT
from components.lib.methods.trsp import Trsp
from components.lib.transformer.selection import AXES, Selection
from components.lib.transformer.text import load_windows
from tests.components.given import Given, digest
from tests.components.lib.training.tiny import Written
from tests.components.lib.transformer.zoo import MODERN

OF_LAYERS = [name for name, method in known_methods().items() if issubclass(method, LayerMethod)]
QUICK = {"steps": 2, "shortlist": 2}
"""Settings of TRSP."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given.lay(tmp_path_factory.mktemp("run"))


def work(given: Given, out: Path, *methods: Method) -> Selection:
    out.mkdir()
    choose(given.release, given.windows, methods=methods, out=out, journal=Written())
    return Selection.load(out)


@pytest.mark.parametrize("method", OF_LAYERS)
def test_every_method_of_layers_leaves_a_selection(method: str, given: Given, tmp_path: Path) -> None:
    before = digest(given.release)
    kind = known_methods()[method]
    settings = {name: value for name, value in (QUICK | {"batch_size": 4}).items() if name in kind.model_fields}
    selection = work(given, tmp_path / "out", kind(ratio=0.5, **settings))
    assert selection.method == method
    assert len(set(selection.removed)) == 2
    assert set(selection.removed) <= set(range(4))
    assert selection.removed == tuple(sorted(selection.order))
    assert all(len(scores) == 4 for scores in selection.scores.values())
    assert not selection.channels
    assert digest(given.release) == before


def test_a_hybrid_whose_layers_of_attention_are_all_chosen_is_refused(given: Given, tmp_path: Path) -> None:
    """Before the training: a model without one cannot generate with its cache, as the check of the cut would find after it."""
    hybrid = next(specimen for specimen in MODERN if specimen.name == "qwen3_5").model(4)
    with pytest.raises(Refusal, match=r"the layers that were chosen, 2, hold every layer of attention"):
        select(hybrid, load_windows(given.windows), [Last(ratio=0.25)], tmp_path, Written())


def test_dress_leaves_a_selection_of_channels(given: Given, tmp_path: Path) -> None:
    before = digest(given.release)
    selection = work(given, tmp_path / "out", Dress(ratio=0.5, axes=AXES))
    assert (selection.method, selection.channels.axes, selection.removed) == ("dress", AXES, ())
    assert [selection.channels.count(axis) for axis in ("hidden", "ffn", "heads")] == [16, 24, 1]
    assert digest(given.release) == before


def test_two_methods_leave_one_selection_of_both(given: Given, tmp_path: Path) -> None:
    layers = work(given, tmp_path / "layers", ShortGPT(ratio=0.25))
    both = work(given, tmp_path / "both", ShortGPT(ratio=0.25), Dress(ratio=0.5))
    assert (both.method, both.channels.axes) == ("shortgpt+dress", ("ffn",))
    assert (both.removed, both.order, both.scores) == (layers.removed, layers.order, layers.scores)
    assert [len(gone) for gone in both.channels.ffn] == [0 if layer in both.removed else 24 for layer in range(4)]


def test_trsp_leaves_the_gates_on_their_way_too(given: Given, tmp_path: Path) -> None:
    work(given, tmp_path / "out", Trsp(ratio=0.5, batch_size=4, steps=2, shortlist=2))
    assert {"selection.json", "trajectory.jsonl", "gates.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.25, 1), (0.4, 2), (0.75, 3)])
def test_the_ratio_is_rounded_to_whole_layers_and_at_least_one(
    ratio: float, count: int, given: Given, tmp_path: Path
) -> None:
    assert len(work(given, tmp_path / "out", ShortGPT(ratio=ratio)).removed) == count


def test_a_ratio_that_leaves_no_layer_is_refused(given: Given, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"methods\.shortgpt\.ratio 0\.9 removes 4 of the model's 4 layers"):
        work(given, tmp_path / "out", ShortGPT(ratio=0.9))
    assert list((tmp_path / "out").iterdir()) == []
