"""DReSS's choice of channels (arXiv 2501.17905): a fixed part of each axis, chosen before the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from components.lib.methods import BatchSize, Method
from components.lib.recipe.section import Count, Fraction
from components.lib.report_parts import Part, Sentence
from components.lib.training.journal import Journal
from components.lib.transformer.channels import ALIGNED, check_channels
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.layout import Axis
from components.lib.transformer.removal import Along, Removal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from components.lib.recipe.training import Regularize


_CHOSEN = {
    "random": "drawn at random",
    "magnitude": "those of the smallest weights",
    "activation": "those of the smallest weights × activations on the calibration windows",
    "wanda": "those of the smallest sum of Wanda's scores, |weight| × norm of the activation, on the calibration windows",
    "fluctuation": "those of the smallest weights × variance of the activations on the calibration windows, as FLAP has it",
}


_CHOSEN_EXPERTS = {
    "random": "drawn at random",
    "magnitude": "those of the smallest weights",
    "activation": "those of the smallest mean of router weight × norm of the output, over the tokens of the calibration windows that are "
    "routed to them, as REAP has it",
}


class Dress(Method):
    """DReSS's choice of channels, made before the training."""

    name: ClassVar[str] = "dress"
    title: ClassVar[str] = "DReSS"
    removes: ClassVar[Literal["layers", "channels"]] = "channels"

    axes: Annotated[tuple[Axis, ...], Field(min_length=1)] = Field(
        ("ffn",),
        description="The axes that are narrowed: hidden (the residual stream, the paper's), ffn (intermediate channels), heads (key-value groups with their query heads); or experts alone, of a mixture of experts.",
    )
    ratio: Fraction | dict[Axis, Fraction] = Field(
        description="The part of every axis to remove, or one for each ({ffn: 0.5, heads: 0.25}).",
    )
    channels: Literal["random", "magnitude", "activation", "wanda", "fluctuation"] = Field(
        "activation",
        description="The removed channels: drawn from the seed, those of the smallest weights; or, on the calibration windows, those of the smallest weights² × activations² (activation), |weights| × norms of activations (wanda, summed over a channel) or weights² × variances of activations (fluctuation, of FLAP). Of experts, activation is REAP's choice: the smallest mean of router weight × norm of the expert's output.",
    )
    multiple: Count | None = Field(
        None,
        description="hidden and ffn keep a multiple of this; 8 when absent, or more if the family asks for it.",
    )
    batch_size: BatchSize = 8
    seed: int = Field(0, description="Seed of the draw.")

    @model_validator(mode="after")
    def _axes(self) -> Dress:
        if len(set(self.axes)) < len(self.axes):
            raise ValueError(f"axes {list(self.axes)} names an axis twice: name each once")
        if isinstance(self.ratio, dict) and set(self.ratio) != set(self.axes):
            raise ValueError(
                f"ratio names {sorted(self.ratio)} and axes {sorted(self.axes)}: name the same axes in both"
            )
        if "experts" in self.axes and self.channels not in _CHOSEN_EXPERTS:
            raise ValueError(f"channels {self.channels} scores no experts: set it to {', '.join(_CHOSEN_EXPERTS)}")
        return self

    @property
    def ratios(self) -> dict[Axis, float]:
        """Return the part of each axis that is removed."""
        return {axis: self.ratio[axis] if isinstance(self.ratio, dict) else self.ratio for axis in self.axes}

    def asked(self, axis: Along) -> float | None:
        """Return the part of the axis that is asked for; None for one that shrinks only with another."""
        return self.ratios.get(axis) if axis != "layers" else None

    def rounding(self, removal: Removal) -> str:
        """Return how the width was rounded."""
        multiple = self.multiple or ALIGNED
        if removal.axis in ("hidden", "ffn") and removal.after % multiple == 0:
            return f"rounded: a multiple of {multiple} stays"
        whole = {"heads": "key-value groups", "experts": "experts, as many from each group of the router"}.get(
            removal.axis, "heads, with which it shrinks"
        )
        return f"rounded to whole {whole}"

    def parts(self, selection: Selection, folder: Path) -> Sequence[Part]:
        """Return a sentence that says which channels are removed."""
        if "experts" in self.axes:
            said = f"The removed experts are {_CHOSEN_EXPERTS[self.channels]}."
        else:
            said = f"The removed channels are {_CHOSEN[self.channels]}."
        said += " Their indices are in report.json, under selection.channels."
        return [Sentence(said)]

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse a checkpoint from which these channels cannot be cut."""
        check_channels(checkpoint, self.ratios, self.multiple)

    def check_training(self, regularize: Regularize) -> None:
        """Refuse the penalty with adapters or for experts.

        It trains slices of the weights to 0: adapters do not change those, and a router chooses an expert whatever its weights are.
        """
        if regularize.schedule == "penalty" and "experts" in self.axes:
            raise ValueError(
                "regularize.schedule penalty takes weights to 0, and a router chooses an expert whatever its weights are: set it to anneal"
            )
        if regularize.schedule == "penalty" and regularize.trainable == "lora":
            raise ValueError(
                "regularize.schedule penalty takes dress's slices of the weights to 0, which adapters do not train: "
                "set regularize.trainable to all, or the schedule to anneal"
            )

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose as many channels of every layer as the ratios ask for; layers that are removed lose none."""
        if "experts" in self.axes:
            from components.lib.methods.dress.experts import choose_experts

            return choose_experts(self, model, windows, before, journal=journal)
        from components.lib.methods.dress.work import choose

        return choose(self, model, windows, before, journal=journal)
