"""Which models and texts an evaluation takes, and its work on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from components.lib.recipe.schema import Evaluate, Recipe
from components.lib.training.journal import Journal

T = TypeVar("T")

MODEL, TEXT = "model/", "text/"


def inputs_of(models: Mapping[str, str], recipe: str) -> dict[str, str]:
    """Name the evaluation's inputs.

    A champion that is the very candidate is left out: a candidate is not measured against itself, and an evaluation stands
    when its candidate becomes champion.

    Args:
        models: references by name, empty where there is none.
        recipe: the pinned recipe's YAML.
    """
    digest = {name: reference.rpartition("@")[2] for name, reference in models.items()}
    chosen = {name: ref for name, ref in models.items() if name != "champion" or digest[name] != digest["candidate"]}
    texts = Recipe.from_yaml(recipe).evaluate.perplexity
    return {f"{MODEL}{name}": reference for name, reference in chosen.items()} | {
        f"{TEXT}{name}": text.path or "" for name, text in texts.items()
    }


def evaluate_run(
    *, evaluate: Evaluate, digests: Mapping[str, str], out: Path, journal: Journal, **folders: Path
) -> None:
    """Leave `evaluation.json`: every model and every text of `folders`, under the names that `inputs_of` gave.

    Args:
        evaluate: the recipe's section.
        digests: the inputs' digests, under the same names.
        out: the folder to fill.
        journal: takes the progress.
        folders: the inputs.
    """
    from components.evaluate.evaluate import evaluate as measure

    measure(
        _under(MODEL, folders),
        _under(TEXT, folders),
        evaluate=evaluate,
        out=out,
        journal=journal,
        model_digests=_under(MODEL, digests),
        text_digests=_under(TEXT, digests),
    )


def _under(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
