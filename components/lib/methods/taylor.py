"""Shortened LLaMA (arXiv 2402.02834): remove, at once, the layers whose weights change the loss the least to first order.

    score_l = Σ over the weights w of layer l of |w · ∂L/∂w|,    L the mean cross-entropy of the next token

The paper's Taylor+ never removes the first four and the last two layers, whose scores it found to mislead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from components.lib.methods import BatchSize, LayerMethod
from components.lib.recipe.section import Count
from components.lib.training.journal import Journal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Taylor(LayerMethod):
    """Shortened LLaMA's Taylor+ criterion: the layers of smallest |weight · gradient|, measured once."""

    name: ClassVar[str] = "taylor"
    title: ClassVar[str] = "Shortened LLaMA (Taylor+)"
    scores = {"taylor": "Σ |weight · gradient of the loss| over the layer's weights"}  # noqa: RUF012

    first: Annotated[int, Field(ge=0)] = Field(
        4, description="The first layers, removed only if the others are too few; 0 is the paper's Taylor without +."
    )
    last: Annotated[int, Field(ge=0)] = Field(2, description="The last layers, removed only if the others are too few.")
    samples: Count = Field(10, description="Calibration windows that the gradient is taken on.")
    batch_size: BatchSize = 8

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose the layers of smallest score.

        The gradients of the layers' weights, as large as the weights, are held once, and the activations of one batch.
        """
        import torch

        from components.lib.training.objective import lm_loss
        from components.lib.transformer.gates import blocks, removable

        measured = windows[: self.samples]
        found = blocks(model)
        done = 0
        with torch.enable_grad(), _only_trained(model, found):
            for batch in measured.split(self.batch_size):
                ids = batch.long().to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits
                # Of the sum of losses, so that the score does not depend on the batches; its scale does not matter.
                (lm_loss(logits, ids) * ids[:, 1:].numel()).backward()
                done += len(batch)
                journal.progress(done, len(measured))
            with torch.no_grad():
                scores = [_score(block) / measured[:, 1:].numel() for block in found]
        layers = range(len(found))
        guarded = {*layers[: self.first], *layers[len(layers) - min(self.last, len(layers)) :]}
        order = sorted(removable(model), key=lambda layer: (layer in guarded, scores[layer]))[: self.count(len(layers))]
        return Selection.of_layers(self.name, order, {"taylor": tuple(scores)})


def _score(block: nn.Module) -> float:
    """Return Σ |w · gradient| over the weights of a layer; biases do not count, as in the paper's code."""
    weights = (weight for name, weight in block.named_parameters() if name.endswith("weight"))
    return sum(
        (weight.float() * weight.grad.float()).abs().sum().item() for weight in weights if weight.grad is not None
    )


@contextmanager
def _only_trained(model: nn.Module, found: nn.Module) -> Iterator[None]:
    """Take gradients of the parameters of `found` alone; afterwards no parameter has one, and what requires one is as it was."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        found.requires_grad_(True)
        yield
    finally:
        for parameter, require in required.items():
            parameter.requires_grad_(require)
            parameter.grad = None
