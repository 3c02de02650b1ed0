"""Local reconstruction: after the transfer ridge, what stays beside the removed parts learns to give what the dense model gives there.

Of removed layers, the blocks beside each run learn the stream; of removed ffn channels, the feed-forward network of each layer learns what
the dense one computes. `components.lib.training.reconstruct` has the losses. Ridge regression starts it, for families whose projections it
holds for; the others, such as Gemma 3 and mixtures of experts, start from the cut. Blocks learn in every family, since nothing of a block is
used but its output; networks in those that have a module for it (not OPT and GPT-2). Removed heads are fitted by ridge regression alone.

It is no training of the model: it sees no logits and no next tokens, and a step costs a part of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeInt

from components.lib.errors import Refusal
from components.lib.recipe.section import Count, Rate
from components.lib.training.journal import Journal
from components.lib.transfers import why_not_fitted
from components.lib.transfers.ridge import Ridge
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import Channels, Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Reconstruct(Ridge):
    """Ridge regression, then local reconstruction by the blocks beside removed layers, or by the networks that lose channels."""

    name: ClassVar[str] = "reconstruct"

    windows: Count = Field(
        default=320, description="Calibration windows that are measured on and learnt from; all if there are fewer."
    )
    before: NonNegativeInt = Field(default=2, description="Layers before each run that learn.")
    after: NonNegativeInt = Field(default=1, description="Layers behind each run that learn.")
    follow: NonNegativeInt = Field(default=2, description="Layers behind those whose output is compared too.")
    steps: Count = Field(
        default=200,
        description="Optimizer steps for each run, and for each layer's feed-forward network if it loses channels.",
    )
    batch_size: Count = Field(default=8, description="Windows an optimizer step.")
    learning_rate: Rate | None = Field(
        default=None,
        description="AdamW's peak learning rate. When absent 0.58 / hidden width: 1e-3 for a model 576 wide.",
    )
    seed: int = Field(default=0, description="Seed of the batches' order.")

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse settings by which nothing would learn."""
        if self.before + self.after == 0:
            raise Refusal(
                "regularize.transfer.reconstruct has before 0 and after 0, so no layer learns: give one of them"
            )

    def apply(self, model: PreTrainedModel, windows: Tensor, selection: Selection, *, journal: Journal) -> None:
        """Re-fit by ridge regression if the family allows it, then train the blocks beside each run, in place."""
        from components.lib.recipe.training import Optimisation
        from components.lib.training.reconstruct import reconstruct, reconstruct_network, recorded, sites
        from components.lib.training.refit import fit_seams, refit_channels, streams
        from components.lib.transformer.gates import blocks, family_in

        measured = windows[: self.windows]
        settings = Optimisation(
            steps=self.steps,
            batch_size=min(self.batch_size, len(measured)),
            learning_rate=self.learning_rate or 0.58 / model.config.get_text_config().hidden_size,
            checkpoint_every=self.steps,
            warmup=0.05,
            seed=self.seed,
        )
        fitted = not why_not_fitted(family_in(model), model.config.to_dict())
        found = sites(selection.removed, len(blocks(model)), self.before, self.after, self.follow)
        sources = {source for site in found for source in site.targets.values()}
        wanted = sorted(sources.union(self.targets(selection)))
        targets = streams(model, measured, wanted)  # of the dense model, before its weights change
        channels = Channels(ffn=selection.channels.ffn, heads=selection.channels.heads)
        stay = [layer for layer in range(len(blocks(model))) if layer not in selection.removed]
        learning = stay if channels.ffn else []
        parts = (_Part(journal, number, len(learning) + len(found)) for number in count())

        for layer, dense in recorded(model, measured) if channels else ():
            if fitted and layer in stay:
                refit_channels(model, measured, Selection(channels=channels), self.strength, layers=[layer])
            if dense and layer in learning:
                reconstruct_network(model, layer, dense, channels, settings, journal=next(parts))
        if fitted:
            fit_seams(model, measured, targets, selection, self.strength)
        for site in found:
            reconstruct(model, measured, targets, selection, site, settings, journal=next(parts))


class _Part:
    """The journal of one of several reconstructions: its progress is a part of the whole, its loss a curve of its own."""

    def __init__(self, journal: Journal, number: int, parts: int) -> None:
        self.journal, self.number, self.parts = journal, number, parts

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record the loss alone, under the name of the reconstruction."""
        self.journal.metrics({f"reconstruction_{self.number + 1}": values["loss"]}, step)

    def progress(self, done: int, total: int, **shown: float) -> None:
        """Report the part of all reconstructions."""
        self.journal.progress(self.number * total + done, self.parts * total, **shown)
