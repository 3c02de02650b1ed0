"""The memory, the disk and the traffic of each stage: its own code is run on fake tensors of the release's shapes.

A training is run for two steps, so that the optimizer has its state; a method chooses among the layers once, on a few windows. What a
choice would decide is assumed: one run of neighbouring layers is removed, as many as the ratio says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from components.evaluate.speed import time_generation
from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe
from components.lib.recipe.training import Optimisation, Regularize
from components.lib.training import regularize as training
from components.lib.training.journal import Silent
from components.lib.training.reconstruct import sites
from components.lib.training.recover import recover
from components.lib.training.refit import runs_of
from components.lib.training.teacher import keep
from components.lib.training.teacher import size as kept_size
from components.lib.transformer.channels import channels_to_remove, cut_widths
from components.lib.transformer.device import computable, raise_weights
from components.lib.transformer.export import answers
from components.lib.transformer.families import WRAPPERS, cut_config, family_of
from components.lib.transformer.layout import text_part
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import NO_CHANNELS, NOTHING, Channels, Selection
from components.lib.transformer.surgery import written_out
from pipeline.plan.fake import Kind, Memory, Peak, counted

WINDOWS = 8
"""Windows that a transfer is run on; it reads as many at once."""


NOTHING_HELD = Peak()


@dataclass(frozen=True)
class Need:
    """The needs of a stage."""

    stage: str
    """The task's name in the pipeline."""
    peak: Peak = NOTHING_HELD
    """Of the device; 0 if the stage holds no model."""
    held: int = 0
    """Bytes by which calibration states that wait in the machine's memory exceed the peak, if that is the device's memory too: a processor."""
    scratch: int = 0
    """Bytes of the stage's temporary disk: inputs, output, and the checkpoint that is being written."""
    moved: int = 0
    """Bytes between the store and the stage, both ways."""
    section: str = ""
    """The section of the recipe whose settings decide the peak."""
    trained: tuple[Peak, ...] = ()
    """The peaks of its trainings that the processes of several devices can divide; what is before them is whole on each device."""
    transferred: int = 0
    """Bytes of the transfer before them."""
    batch: int = 1
    """Windows an optimizer step."""
    micro: int = 1
    """Windows a forward pass in the plan."""
    block: int = 0
    """Bytes of a block's weights, as they are stored."""

    def divided(self, devices: int) -> int:
        """Return the bytes on each of several devices if FSDP divides the trainings among them.

        Weights, gradients, optimizer and teacher are divided, and the batch is; two whole blocks are added, which FSDP gathers.
        """
        share = min(self.micro, -(-self.batch // devices)) / self.micro
        found = [self.transferred]
        for peak in self.trained:
            held = peak.weights + peak.gradients + peak.optimizer + peak.teacher
            found.append(round(held / devices + share * (peak.logits + peak.activations) + 2 * self.block))
        return max(found)


@dataclass(frozen=True)
class Shape:
    """A release by its config alone."""

    config: Mapping[str, Any]
    dtype: str
    """That of the stored weights, by torch's name."""
    unpacked: bool = False
    """Whether it is a GGUF file, which is unpacked in memory as a whole when it is pinned."""

    def model(self, memory: Memory | None = None) -> PreTrainedModel:
        """Make the model; inside `counted` it has no bytes."""
        config = AutoConfig.for_model(**{**self.config})
        # As `load_model` does: a wrapper of images and text has another class.
        wraps = self.config["model_type"] in WRAPPERS
        auto: Any = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
        model = auto.from_config(config, dtype=getattr(torch, self.dtype)).eval()
        if memory:
            memory.model = model
        return model

    @cached_property
    def bytes(self) -> int:
        """The bytes of the stored weights, a tied head once."""
        with counted("cpu"):
            return sum(weight.numel() * weight.element_size() for weight in self.model().parameters())

    @property
    def width(self) -> int:
        """The width of the hidden state."""
        text = text_part(self.config)
        return text.get("hidden_size", text.get("n_embd", 0))

    @property
    def itemsize(self) -> int:
        """The bytes of a stored number."""
        return getattr(torch, self.dtype).itemsize

    def layers(self) -> int:
        """The number of layers."""
        return family_of(self.config).layers(self.config)

    def selection(self, recipe: Recipe) -> Selection:
        """Return a selection of the size that the recipe asks for: the layers before the last, the first channels.

        The last layers, if the config can say which layers stay of no others.
        """
        layers, selection = self.layers(), NOTHING
        for method in recipe.methods.chosen:
            if method.removes == "layers":
                count = method.count(layers)  # type: ignore[attr-defined]
                removed = range(layers - 1 - count, layers - 1) if count < layers - 1 else range(1, count + 1)
                selection = Selection.of_layers(method.name, list(removed))
                try:
                    self.without(selection)
                except Refusal:
                    selection = Selection.of_layers(method.name, list(range(layers - count, layers)))
            else:
                ratios, multiple = method.ratios, method.multiple  # type: ignore[attr-defined]
                gone = channels_to_remove(family_of(self.config), self.config, ratios, multiple)
                rows = {axis: (tuple(range(count)),) * layers for axis, count in gone.items() if axis != "hidden"}
                channels = Channels(hidden=tuple(range(gone.get("hidden", 0))), **rows)
                selection = selection.with_channels(method.name, channels)
        return selection

    def without(self, selection: Selection) -> Shape:
        """Return the shape after the cut."""
        family = family_of(self.config)
        cut = cut_config(written_out(self.config, family), family, selection.removed)
        channels = selection.channels
        return Shape(cut_widths(cut, family, _of_kept(channels, selection.removed)), self.dtype)


def _of_kept(channels: Channels, removed: tuple[int, ...]) -> Channels:
    """Return the channels of the layers that stay."""
    if not channels:
        return NO_CHANNELS
    rows = {
        axis: tuple(row for layer, row in enumerate(getattr(channels, axis)) if layer not in removed)
        for axis in ("ffn", "heads", "experts")
    }
    return channels.model_copy(update=rows)


def needs(recipe: Recipe, release: Shape, kind: Kind, only: Collection[str] = ()) -> Iterator[Need]:
    """Yield what every stage needs that the recipe asks for, in the order of the pipeline.

    Args:
        recipe: the recipe.
        release: the shape of the release.
        kind: the device of the stages.
        only: the stages to plan, by the names of their tasks; all if it is empty.

    Raises:
        Refusal: the recipe cannot be applied to the release.
    """
    case = _Case(recipe, release, kind)
    made = (make(case) for name, make in _STAGES.items() if not only or name in only)
    return (one for one in made if one is not None)


@dataclass(frozen=True)
class _Case:
    recipe: Recipe
    release: Shape
    kind: Kind

    @cached_property
    def selection(self) -> Selection:
        return self.release.selection(self.recipe)

    @cached_property
    def cut(self) -> Shape:
        return self.release.without(self.selection)

    @property
    def text(self) -> int:
        """Bytes of the calibration windows."""
        return 4 * self.recipe.calibration.samples * self.recipe.calibration.length

    def windows(self, count: int) -> Tensor:
        return torch.zeros(count, self.recipe.calibration.length, dtype=torch.int32)


def _pin(case: _Case) -> Need:
    peak = Peak(weights=case.release.bytes) if case.release.unpacked else NOTHING_HELD
    return Need("pin", peak, scratch=case.release.bytes, moved=2 * case.release.bytes)


def _learn_gates(case: _Case) -> Need:
    with counted(case.kind) as memory:
        model = case.release.model(memory)
        for method in case.recipe.methods.chosen:
            # One layer is chosen: each further one takes as much memory.
            update: dict[str, Any] = {"ratio": 1 / case.release.layers()} if method.removes == "layers" else {}
            update |= {"steps": 2} if "steps" in type(method).model_fields else {}
            windows = case.windows(_windows(method, case.recipe.calibration.length))
            raise_weights(model)
            method.model_copy(update=update).choose(model, windows, NOTHING, journal=Silent(), out=None)
    read = case.release.bytes + case.text
    return Need("learn-gates", memory.peak, scratch=read, moved=read, section="methods")


def _windows(method: Any, length: int) -> int:
    """Return how many windows a method reads at once, or holds the states of."""
    tokens = sum(getattr(method, name) for name in type(method).model_fields if name.endswith("_tokens"))
    return max(getattr(method, "batch_size", 1), -(-tokens // length))


def _regularize(case: _Case) -> Need | None:
    settings = case.recipe.regularize
    transfer = settings.transfer.chosen
    if settings.schedule == "none" and transfer is None:
        return None
    peaks, transferred, waiting, state = [], NOTHING_HELD, 0, 0
    if transfer:
        quick = transfer.model_copy(update={"steps": 2} if "steps" in type(transfer).model_fields else {})
        with counted(case.kind) as memory:
            model = case.release.model(memory)
            with computable(model):
                quick.apply(model, case.windows(WINDOWS), case.selection, journal=Silent())
        transferred = memory.peak
        waiting = transferred.total + _states(case)
    if settings.schedule != "none":
        memory = _trained(case, case.release, settings, case.selection)
        peaks.append(memory.peak)
        state = _state(memory, settings)
    # The states wait while the transfer works, and are gone when the training begins.
    held = max(0, waiting - _largest([transferred, *peaks]).total)
    size = case.release.bytes
    return _training("regularize", peaks, settings, size, size, state, case, held=held, transferred=transferred)


def _states(case: _Case) -> int:
    """Return the bytes of the dense model's states that the transfer keeps: streams, or what a network reads and writes beside them."""
    transfer: Any = case.recipe.regularize.transfer.chosen
    targets = {last for first, last in runs_of(case.selection.removed) if first}
    if hasattr(transfer, "follow"):
        found = sites(case.selection.removed, case.release.layers(), transfer.before, transfer.after, transfer.follow)
        targets |= {source for site in found for source in site.targets.values()}
    kept = max(len(targets), 4 if hasattr(transfer, "follow") and case.selection.channels.ffn else 0)
    windows = min(case.recipe.calibration.samples, getattr(transfer, "windows", 0))
    tokens = windows * case.recipe.calibration.length
    # Twice, while the batches of a layer are put together.
    return 2 * kept * tokens * case.release.width * case.release.itemsize


def _control(kind: str, task: str) -> Callable[[_Case], Need | None]:
    def need(case: _Case) -> Need | None:
        """Return what the control needs, or None if the recipe does not ask for it."""
        if kind not in case.recipe.evaluate.controls:
            return None
        settings = case.recipe.regularize.model_copy(
            update={"transfer": type(case.recipe.regularize.transfer)(), "schedule": "anneal"}
        )
        first = kind == "pruned-first"
        start = case.cut if first else case.release
        memory = _trained(case, start, settings, case.selection if first else NOTHING, already_cut=first)
        peaks, state = [memory.peak], _state(memory, settings)
        if case.recipe.recover.enabled:
            peaks.append(_recovered(case, start).peak)
        read = case.release.bytes + (start.bytes if first else 0)
        return _training(task, peaks, settings, read, start.bytes, state, case)

    return need


def _prune(case: _Case) -> Need:
    peaks = []
    for shape in (case.release, case.cut):
        with counted(case.kind) as memory:
            answers(shape.model(memory))
        peaks.append(memory.peak)
    both = case.release.bytes + case.cut.bytes
    return Need("prune", _largest(peaks), scratch=both, moved=both)


def _lora_rft(case: _Case) -> Need | None:
    settings = case.recipe.recover
    if not settings.enabled:
        return None
    memory = _recovered(case, case.cut)
    return _training(
        "lora-rft",
        [memory.peak],
        settings,
        case.cut.bytes,
        case.cut.bytes,
        _state(memory, settings),
        case,
        section="recover",
    )


def _evaluate(case: _Case) -> Need:
    evaluate = case.recipe.evaluate
    with counted(case.kind) as memory:
        model = case.release.model(memory)
        with computable(model):
            perplexity(
                model, torch.zeros(evaluate.batch_size, evaluate.length or 0, dtype=torch.long), evaluate.batch_size
            )
        if evaluate.speed.enabled:
            # A larger batch that does not fit is left out by the stage.
            time_generation(model, torch.zeros(min(evaluate.speed.batches), evaluate.speed.prompt, dtype=torch.long), 1)
    sizes = [case.release.bytes, case.cut.bytes]
    sizes += [{"pruned-first": case.cut, "dense-trained": case.release}[kind].bytes for kind in evaluate.controls]
    return Need("evaluate", memory.peak, scratch=sum(sizes), moved=sum(sizes), section="evaluate")


_STAGES: Mapping[str, Callable[[_Case], Need | None]] = {
    "pin": _pin,
    "learn-gates": _learn_gates,
    "regularize": _regularize,
    "prune": _prune,
    "lora-rft": _lora_rft,
    "control": _control("pruned-first", "control"),
    "control-2": _control("dense-trained", "control-2"),
    "evaluate": _evaluate,
}
"""By the names of the tasks."""


def _trained(
    case: _Case, shape: Shape, settings: Regularize, selection: Selection, already_cut: bool = False
) -> Memory:
    with counted(case.kind) as memory:
        windows, short, kept = case.windows(settings.batch_size), _short(settings), None
        if training.keeps_teacher(settings):
            kept = keep(case.release.model(memory), windows, short, Path())
        model = shape.model(memory)
        if training.needs_teacher(settings, already_cut):
            memory.teacher = case.release.model()
        training.regularize(model, memory.teacher or kept, windows, selection, short, already_cut=already_cut)
    return memory


def _recovered(case: _Case, shape: Shape) -> Memory:
    settings = case.recipe.recover
    with counted(case.kind) as memory:
        short = _short(settings).model_copy(update={"validation": 0.5})
        recover(shape.model(memory), case.windows(2 * settings.batch_size), short)
    return memory


def _short(settings: Any) -> Any:
    return settings.model_copy(update={"steps": 2, "checkpoint_every": 2, "micro_batch_size": settings.surely_fits})


def _state(memory: Memory, settings: Optimisation) -> int:
    """Return the bytes of a checkpoint of the training: the trained weights and the optimizer's state."""
    groups = memory.optimizer.param_groups if memory.optimizer else ()
    numbers = sum(weight.numel() for group in groups for weight in group["params"])
    return numbers * (2 if settings.precision == "bf16" else 4) + memory.of_optimizer()


def _training(
    task: str,
    peaks: list[Peak],
    settings: Optimisation,
    read: int,
    written: int,
    state: int,
    case: _Case,
    held: int = 0,
    section: str = "regularize",
    transferred: Peak = NOTHING_HELD,
) -> Need:
    checkpoints = (settings.steps - 1) // settings.checkpoint_every
    calibration = case.recipe.calibration
    further = min(calibration.training_samples or 0, settings.steps * settings.batch_size)
    streamed = 4 * further * calibration.length  # never on the disk at once
    samples = calibration.training_samples or calibration.samples
    kept = kept_size(samples, calibration.length, case.release.width, case.release.itemsize, settings)
    return Need(
        task,
        _largest([transferred, *peaks]),
        held,
        scratch=read + case.text + written + kept + (state if checkpoints else 0),
        moved=read + case.text + streamed + written + checkpoints * state,
        section=section,
        # States of 8 bits cannot be divided.
        trained=() if settings.optimizer == "adamw-8bit" else tuple(peaks),
        transferred=transferred.total,
        batch=settings.batch_size,
        micro=settings.surely_fits,
        block=case.release.bytes // case.release.layers(),
    )


def _largest(peaks: list[Peak]) -> Peak:
    return max(peaks, key=lambda peak: peak.total)
