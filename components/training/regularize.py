"""Train a model so that its chosen layers can go: TRSP's second regularisation, and the same training without it.

regularize(model, teacher, windows, removed, settings)                       # the candidate: cut it afterwards
regularize(drop_layers(model, removed), teacher, windows, (), settings)      # control: pruned first
regularize(model, teacher, windows, (), settings)                            # control: the dense model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.recipe import Regularize
from components.training import loop, lora, objective, penalty
from components.training.journal import Checkpoints, Journal, NoCheckpoints, Silent
from components.transformer.gates import final_state, watched


def needs_teacher(settings: Regularize, layers: Sequence[int]) -> bool:
    """Say whether `regularize` must be given the dense model as a second one.

    It need not where the objective asks for none, nor where adapters are trained on the dense model: it is its own teacher
    with the adapters off.
    """
    own = settings.trainable == "lora" and len(layers) > 0
    return objective.uses_teacher(settings.objective) and not own


def regularize(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    windows: Tensor,
    layers: Sequence[int],
    settings: Regularize,
    *,
    checkpoints: Checkpoints | None = None,
    journal: Journal | None = None,
    section: str = "regularize",
) -> PreTrainedModel:
    """Train `model` in place and return it, in the type it came in, with any adapters merged.

    Args:
        model: what is trained.
        teacher: the dense model, frozen; None where `needs_teacher` says no.
        windows: token ids (windows, length).
        layers: the layers to make the identity; none for a control, which gets the objective alone.
        settings: schedule, objective and optimisation.
        checkpoints: where the training keeps its place.
        journal: takes loss, its parts and the learning rate.
        section: the recipe's section, named in a refusal.

    Raises:
        Refusal: the loss is not finite, or the optimizer is not to be had here.
        ValueError: the objective needs a teacher and there is none.
    """
    if settings.schedule == "none":
        return model
    if teacher is None and needs_teacher(settings, layers):
        raise ValueError("the objective compares with the dense model: give it as the teacher")
    trained: PreTrainedModel | PeftModel = (
        lora.adapted(model, settings.lora, settings.seed)
        if settings.trainable == "lora"
        else model.requires_grad_(True)
    )
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    loop.train(
        trained,
        windows,
        _Loss(model, trained, teacher, layers, settings),
        settings,
        section=section,
        checkpoints=checkpoints or NoCheckpoints(),
        journal=journal or Silent(),
    )
    return lora.merged(trained) if isinstance(trained, PeftModel) else model


class _Loss:
    """What a step minimises: the objective, and the penalty on the chosen layers where that is the schedule."""

    def __init__(
        self,
        model: PreTrainedModel,
        trained: PreTrainedModel | PeftModel,
        teacher: nn.Module | None,
        layers: Sequence[int],
        settings: Regularize,
    ) -> None:
        self.model, self.trained, self.teacher = model, trained, teacher
        self.layers, self.settings = layers, settings

    @contextmanager
    def __call__(self, wrapped: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield the parts of the loss on a batch (batch, length) while the step's gates hold."""
        settings = self.settings
        target = self._targets(batch)  # before the gates, which the teacher may not see
        gate = penalty.annealed(step, settings.steps, settings.anneal) if settings.schedule == "anneal" else 1.0
        watching = settings.schedule == "penalty" and len(self.layers) > 0
        with (
            penalty.gated_at(self.model, self.layers, gate),
            watched(self.model, self.layers if watching else ()) as seen,
            final_state(self.model) as final,
        ):
            logits = wrapped(input_ids=batch, use_cache=False).logits
            parts = objective.weighted(settings.objective, logits, final.value, batch, target)
            if watching:
                parts["penalty"] = penalty.penalty(seen, settings.norm)
                weight = settings.strength * penalty.ramped(step, settings.steps, settings.ramp)
                parts["loss"] = parts["loss"] + weight * parts["penalty"]
            yield parts

    def _targets(self, batch: Tensor) -> objective.Targets:
        """Ask the teacher; trained adapters switched off are the dense model."""
        if self.teacher is not None:
            return objective.targets(self.teacher.to(batch.device), batch, self.settings.objective)
        if isinstance(self.trained, PeftModel) and objective.uses_teacher(self.settings.objective):
            with self.trained.disable_adapter():
                return objective.targets(self.model, batch, self.settings.objective)
        return objective.Targets(None, None)
