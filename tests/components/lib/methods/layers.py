"""A model that counts and can do without two of its layers, and how a method of layers is asked for some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from components.lib.methods import LayerMethod, Method, known_methods
from components.lib.recipe.training import Objective, Regularize
from components.lib.training.journal import Journal, Silent
from components.lib.training.regularize import regularize
from components.lib.transformer.gates import skipped
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import NOTHING, Selection
from tests.components.lib.training.tiny import chosen, counting, llama

LAYERS = 6
OF_LAYERS = [name for name, method in known_methods().items() if issubclass(method, LayerMethod)]


def teach() -> LlamaForCausalLM:
    """Train a model that counts, and whose layers 1 and 4 it can do without."""
    objective = Objective(lm=1, kl=0, state=0)
    settings = Regularize(
        steps=80, learning_rate=3e-3, precision="fp32", objective=objective, schedule="penalty", strength=1.0, ramp=0.1
    )
    return regularize(llama(LAYERS), None, counting(), chosen(1, 4), settings)


def method(name: str, count: int, **settings: Any) -> Method:
    """The method, asked for `count` of the layers; settings that it does not have are left out."""
    kind = known_methods()[name]
    own = {field: value for field, value in settings.items() if field in kind.model_fields}
    return kind(ratio=count / LAYERS, **own)


def choose(
    model: LlamaForCausalLM,
    name: str,
    count: int,
    *,
    journal: Journal | None = None,
    out: Path | None = None,
    **settings: Any,
) -> Selection:
    """The choice of `count` layers."""
    chooser = method(name, count, **settings)
    return chooser.choose(model, counting(), NOTHING, journal=journal or Silent(), out=out)


def cost(model: LlamaForCausalLM, layers: tuple[int, ...]) -> float:
    """The perplexity without some layers."""
    with skipped(model, layers):
        return perplexity(model, counting())
