"""When the gates close: as the recipe says, and else by what is removed."""

from __future__ import annotations

import pytest

from components.lib.recipe.training import Regularize
from components.lib.training.schedule import annealed_part


def test_the_recipes_own_value_comes_first() -> None:
    assert {annealed_part(Regularize(anneal=0.3), layers) for layers in (True, False)} == {0.3}


def test_gates_of_layers_fall_more_slowly_than_those_of_channels() -> None:
    assert annealed_part(Regularize(), layers=True) > annealed_part(Regularize(), layers=False) > 0


@pytest.mark.parametrize("layers", [True, False])
def test_0_closes_them_before_the_first_step(layers: bool) -> None:
    assert annealed_part(Regularize(anneal=0), layers) == 0
