"""Which models and texts an evaluation takes, and its work on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from components.recipe import Evaluate, Recipe
from components.training.journal import Journal

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


def evaluate_run(*, evaluate: Evaluate, out: Path, journal: Journal, **folders: Path) -> None:
    """Leave `evaluation.json`: every model and every text of `folders`, under the names that `inputs_of` gave."""
    from components.evaluate.evaluate import evaluate as measure

    models = {name.removeprefix(MODEL): folder for name, folder in folders.items() if name.startswith(MODEL)}
    texts = {name.removeprefix(TEXT): folder for name, folder in folders.items() if name.startswith(TEXT)}
    measure(models, texts, evaluate=evaluate, out=out, journal=journal)
