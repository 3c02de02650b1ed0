"""Train a model so that chosen layers and channels can be removed; train the controls in the same way.

regularize(model, teacher, windows, selection, settings)                             # the candidate: cut it afterwards
regularize(cut_model, teacher, windows, selection, settings, already_cut=True)       # control: pruned first
regularize(model, teacher, windows, NOTHING, settings)                               # control: the dense model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.lib.recipe.training import Regularize
from components.lib.training import loop, lora, objective, penalty, ranks
from components.lib.training.journal import Checkpoints, Journal, NoCheckpoints, Silent
from components.lib.training.schedule import annealed_part
from components.lib.training.teacher import Kept, Numbered
from components.lib.training.windows import Windows
from components.lib.transformer.device import computable
from components.lib.transformer.gates import final_state, text_config, thawed, watched
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import NO_CHANNELS, Selection


def needs_teacher(settings: Regularize, already_cut: bool = False) -> bool:
    """Return True if `regularize` needs the dense model as a second model.

    It is not needed if the objective does not use it, nor if its outputs are kept, nor if adapters are trained on the dense model: with its adapters off the
    model is its own teacher. After a transfer it no longer is the dense model.
    """
    own = settings.trainable == "lora" and not already_cut and settings.transfer.chosen is None
    return compares(settings) and settings.teacher_top is None and not own


def keeps_teacher(settings: Regularize) -> bool:
    """Return True if the dense model's outputs are to be kept (`components.lib.training.teacher.keep`) and given to `regularize`."""
    return compares(settings) and settings.teacher_top is not None


def compares(settings: Regularize) -> bool:
    """Return True if the training compares with the dense model."""
    return settings.trains and objective.uses_teacher(settings.objective)


def regularize(
    model: PreTrainedModel,
    teacher: PreTrainedModel | Kept | None,
    windows: Tensor | Windows,
    selection: Selection,
    settings: Regularize,
    *,
    already_cut: bool = False,
    checkpoints: Checkpoints | None = None,
    journal: Journal | None = None,
    section: str = "regularize",
) -> PreTrainedModel:
    """Train `model` in place and return it, in its original dtype, with any adapters merged.

    Args:
        model: the model to train.
        teacher: the dense model, frozen; what is kept of it if `keeps_teacher`; None if `needs_teacher` is False too.
        windows: token ids (windows, length).
        selection: the layers and channels to remove; `NOTHING` for the dense model's own training.
        settings: schedule, objective and optimisation.
        already_cut: whether the selection is removed already: a control, which is trained on the objective alone.
        checkpoints: stores the training's checkpoints.
        journal: takes loss, its parts and the learning rate, and the norm of the slices to remove.
        section: the recipe's section, named in a refusal.

    Raises:
        Refusal: the loss is not finite, or another optimizer wrote the checkpoint.
        ValueError: the objective needs a teacher and there is none, what is kept of it is that of another training, or the processes divide
            the weights of an optimizer of 8 bits.
    """
    if not settings.trains:
        return model
    if teacher is None and (needs_teacher(settings, already_cut) or keeps_teacher(settings)):
        raise ValueError("the objective compares with the dense model: give it as the teacher")
    trained: PreTrainedModel | PeftModel = (
        lora.adapted(model, settings.lora, settings.seed) if settings.trainable == "lora" else thawed(model)
    )
    # The release's width, so that a control that was narrowed first is trained at the same rate.
    width = text_config(model).hidden_size + (len(selection.channels.hidden) if already_cut else 0)
    settings = loop.with_learning_rate(settings, None if settings.trainable == "lora" else width)
    device = ranks.join()
    beside = None if isinstance(teacher, Kept) else teacher
    divided = ranks.must_divide(trained, beside, settings)
    if isinstance(teacher, Kept):
        windows = Numbered(windows, teacher)
    elif teacher is not None:
        teacher.eval().requires_grad_(False)
        teacher = beside = ranks.divided(teacher, device) if divided else teacher.to(device)
    with computable(beside):
        loop.train(
            trained,
            windows,
            _Loss(trained, teacher, selection, already_cut, settings),
            settings,
            section=section,
            checkpoints=checkpoints or NoCheckpoints(),
            journal=journal or Silent(),
            divided=divided,
        )
    return lora.merged(trained) if isinstance(trained, PeftModel) else model


class _Loss:
    """The loss of a step: the objective, and for the schedule penalty the penalties on the selection."""

    def __init__(
        self,
        trained: PreTrainedModel | PeftModel,
        teacher: PreTrainedModel | Kept | None,
        selection: Selection,
        already_cut: bool,
        settings: Regularize,
    ) -> None:
        self.teacher, self.settings = teacher, settings
        self.already_cut = already_cut
        self.hidden = selection.channels.hidden
        self.layers = () if already_cut else selection.removed
        self.channels = NO_CHANNELS if already_cut else selection.channels
        self.slices = penalty.Slices(trained, self.channels, settings.norm) if self.channels.narrow else None

    @contextmanager
    def __call__(self, wrapped: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
        """Yield the parts of the loss on a batch (batch, length) while the step's gates hold; numbered windows if outputs are kept."""
        settings = self.settings
        if isinstance(self.teacher, Kept):
            rows, batch = batch[:, 0], batch[:, 1:]
            target = self.teacher.targets(rows)
        else:
            target = self._targets(wrapped, batch)  # before the gates, which must not change the teacher
        target = target._replace(state=_without(target.state, self.hidden))
        penalised = settings.schedule == "penalty"
        gate = 1.0 if penalised else penalty.annealed(step, settings.steps, annealed_part(settings, bool(self.layers)))
        with (
            penalty.gated_at(wrapped, self.layers, gate),
            narrowed(wrapped, self.channels, gate),
            watched(wrapped, self.layers if penalised else ()) as seen,
            final_state(wrapped) as final,
        ):
            logits = wrapped(input_ids=batch, use_cache=False).logits
            parts = objective.weighted(settings.objective, logits, self._staying(final.value), batch, target)
            weight = settings.strength * penalty.ramped(step, settings.steps, settings.ramp) if penalised else 0.0
            if seen:
                parts["penalty"] = penalty.penalty(seen, settings.norm)
                parts["loss"] = parts["loss"] + weight * parts["penalty"]
            if self.slices:
                with torch.set_grad_enabled(penalised):
                    norms = self.slices.norms(wrapped)
                if penalised:
                    parts["loss"] = parts["loss"] + weight * torch.stack(list(norms.values())).sum()
                # Scaled by the gates, as the model uses them.
                parts |= {name: norm.detach() * gate for name, norm in norms.items()}
            yield parts

    def _targets(self, wrapped: nn.Module, batch: Tensor) -> objective.Targets:
        """Return the teacher's outputs; with its adapters off, the trained model is the teacher."""
        adapted = ranks.inner(wrapped)
        if self.teacher is None and isinstance(adapted, PeftModel) and objective.uses_teacher(self.settings.objective):
            with adapted.disable_adapter():
                return objective.targets(adapted, batch, self.settings.objective)
        return objective.targets(self.teacher, batch, self.settings.objective)

    def _staying(self, state: Tensor | None) -> Tensor | None:
        return state if self.already_cut else _without(state, self.hidden)


def _without(state: Tensor | None, hidden: Sequence[int]) -> Tensor | None:
    """Return a state (batch, length, hidden) without some of its channels."""
    if state is None or not hidden:
        return state
    stays = torch.ones(state.shape[-1], dtype=torch.bool, device=state.device)
    stays[list(hidden)] = False
    return state[..., stays]
