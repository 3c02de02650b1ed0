"""Local reconstruction: train only the blocks beside a run of removed layers, to give the dense model's residual stream again.

For a run i … j of removed layers, the `before` layers before it and the `after` layers behind it learn, and the `follow` layers behind
those are computed with their weights fixed. The loss compares streams and needs no logits:

    Σ_ℓ  mean over tokens of ‖h_ℓ − L_ℓ‖² / ‖L_ℓ‖²

h_ℓ is the stream behind layer ℓ of the cut model, L_ℓ the dense model's behind the same layer; for ℓ = i − 1 it is the dense stream behind
layer j, so that the blocks before the run also do the run's work. ℓ runs over i − 1 and the layers behind the run that learn or follow. First tokens of windows are left out: their
states are many times larger than the others'. The layers below are computed once, those above never, so that a step costs a small part
of a step of the whole model. Several runs are reconstructed from the first to the last, each in the model with those before it.

A feed-forward network that loses channels learns by itself, in every layer, to give what the dense one gives on the dense model's inputs:

    mean over tokens of ‖f_S(x) − f(x)‖² / (‖f(x)‖² + median ‖f(x)‖²)

f_S is the network with the channels that stay, cut for real while it learns. Its first tokens count too, since some channels write nothing
but their states. To give the dense stream from the cut model's own would be to make up for the errors of all layers below too, which serves
worse: it fits the errors of one text.

(Local reconstruction of what stays beside a cut: arXiv 2510.14444; here the stream of several layers is compared, since the error of one layer
does not tell which of its directions the next ones read.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from components.lib.recipe.training import Optimisation
from components.lib.training import loop
from components.lib.training.journal import Journal, NoCheckpoints
from components.lib.training.objective import relative_distance
from components.lib.training.refit import runs_of, streams, writers_in
from components.lib.transformer.channels import kept_indices, layout_of
from components.lib.transformer.gates import blocks, bypassed, family_in, resumed, rows_of, watched
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import Channels, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Site:
    """The layers of one local reconstruction, in the numbering of the dense model."""

    trained: tuple[int, ...]
    """Layers whose weights learn, ascending."""
    targets: Mapping[int, int]
    """Layer whose stream is compared → the dense model's layer behind which the target stands."""

    @property
    def above(self) -> int:
        """The last layer that is computed."""
        return max(*self.trained, *self.targets)


def sites(removed: Sequence[int], layers: int, before: int, after: int, follow: int) -> list[Site]:
    """Return a site for each run of removed layers, from the first run to the last.

    A site ends before the next run, which is removed later. A run that begins with layer 0 has no layer before it, and one that nothing
    stands beside has no site.

    >>> sites([2, 3, 6], 9, before=1, after=1, follow=1)
    [Site(trained=(1, 4), targets={1: 3, 4: 4, 5: 5}), Site(trained=(5, 7), targets={5: 6, 7: 7, 8: 8})]
    """
    runs, found = runs_of(removed), []
    for number, (first, last) in enumerate(runs):
        end = runs[number + 1][0] if number + 1 < len(runs) else layers
        below = [layer for layer in range(first) if layer not in removed][-before:] if before else []
        behind = list(range(last + 1, min(last + 1 + after + follow, end)))
        trained = (*below, *behind[:after])
        targets = ({first - 1: last} if below else {}) | {layer: layer for layer in behind}
        if trained and targets:
            found.append(Site(trained, targets))
    return found


def reconstruct(
    model: PreTrainedModel,
    windows: Tensor,
    targets: Mapping[int, Tensor],
    selection: Selection,
    site: Site,
    settings: Optimisation,
    *,
    journal: Journal,
) -> None:
    """Train the layers of a site in place; all other weights stay as they are.

    Args:
        model: the full-size model, with the reconstructions before this one.
        windows: token ids (windows, length).
        targets: layer → the dense model's stream behind it (windows, length, hidden), from `streams`.
        selection: what is removed; channels are narrowed while the layers learn.
        site: the layers that learn, and the layers that are compared.
        settings: the optimisation; its learning rate is given.
        journal: takes the progress and the loss.

    Raises:
        Refusal: the loss is not finite.
    """
    asked = {name: weight.requires_grad for name, weight in model.named_parameters()}
    start = site.trained[0] - 1
    goals = {layer: targets[source] for layer, source in site.targets.items()}
    with ExitStack() as stack:
        stack.enter_context(narrowed(model, selection.channels))
        if start >= 0:
            with bypassed(model, [layer for layer in selection.removed if layer <= start]):
                stream = streams(model, windows, [start])[start]
            stack.enter_context(resumed(model, start, windows, stream))
        idle = [
            layer for layer in range(start + 1, len(blocks(model))) if layer > site.above or layer in selection.removed
        ]
        stack.enter_context(bypassed(model, idle))
        model.requires_grad_(False)
        for layer in site.trained:
            blocks(model)[layer].requires_grad_(True)
        loop.train(
            _Body(model),
            windows,
            _Loss(model, windows, goals),
            settings,
            section="regularize.transfer.reconstruct",
            checkpoints=NoCheckpoints(),
            journal=journal,
        )
    for name, weight in model.named_parameters():
        weight.requires_grad_(asked[name])


@dataclass(frozen=True)
class Recorded:
    """The feed-forward network of a layer, with what it reads and writes in the dense model: both (windows, length, hidden)."""

    network: nn.Module
    inputs: Tensor
    outputs: Tensor


def network_of(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """Return the module that is a layer's feed-forward network and nothing else, or None.

    OPT's block holds the projections itself, and GPT-2's projections hold their widths apart from the weights.
    """
    writers = list(writers_in(model, layer, "ffn"))
    if layout_of(family_in(model)).transposed or len(writers) != 1 or "." not in writers[0]:
        return None
    return blocks(model)[layer].get_submodule(writers[0].rpartition(".")[0])


@torch.no_grad()
def recorded(model: PreTrainedModel, windows: Tensor) -> Iterator[tuple[int, Recorded | None]]:
    """Yield each layer with what its feed-forward network computes; None if it has no such module, or one that reads more than one tensor.

    It is recorded in the model as it is at the start: a layer may be changed while it is the one that is yielded. Until then every forward
    pass on the windows begins with the stream before the layer.
    """
    below: Tensor | None = None
    for layer in range(len(blocks(model))):
        network = network_of(model, layer)
        pairs: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Any, pairs: list[Any] = pairs) -> None:
            if len(inputs) == 1 and isinstance(output, Tensor):
                pairs.append((inputs[0].cpu(), output.cpu()))

        with resumed(model, layer - 1, windows, below) if below is not None else nullcontext():
            handle = network.register_forward_hook(keep) if network is not None else None
            behind = streams(model, windows, [layer])[layer]
            if handle is not None:
                handle.remove()
            whole = network is not None and sum(len(x) for x, _ in pairs) == len(windows)
            yield (
                layer,
                Recorded(network, *map(torch.cat, zip(*pairs, strict=True))) if network is not None and whole else None,
            )
        below = behind


def reconstruct_network(
    model: PreTrainedModel, layer: int, dense: Recorded, channels: Channels, settings: Optimisation, *, journal: Journal
) -> None:
    """Train the feed-forward network of a layer without its removed channels to give what the dense one gives, in place.

    Args:
        model: the full-size model.
        layer: whose network it is.
        dense: the network, with what it read and wrote in the dense model.
        channels: what is removed; the weights of these channels stay as they are.
        settings: the optimisation; its learning rate is given.
        journal: takes the progress and the loss.

    Raises:
        Refusal: the loss is not finite.
    """
    network = _Network(model, layer, dense.network, channels)
    size = dense.outputs.float().square().sum(-1)
    weights = 1 / (size + size.median())

    @contextmanager
    def loss(wrapped: nn.Module, rows: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
        at = rows.flatten().cpu()
        error = wrapped(dense.inputs[at].to(rows.device)).float() - dense.outputs[at].to(rows.device).float()
        yield {"loss": (error.square().sum(-1) * weights[at].to(rows.device)).mean()}

    loop.train(
        network,
        torch.arange(len(dense.inputs))[:, None],
        loss,
        settings,
        section="regularize.transfer.reconstruct",
        checkpoints=NoCheckpoints(),
        journal=journal,
    )
    network.write_back()


class _Network(nn.Module):
    """A feed-forward network with the channels that stay: its weights are cut copies, its computation is that of the full-size module."""

    def __init__(self, model: PreTrainedModel, layer: int, full: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.full = [full]  # in a list, so that its weights are not this module's
        path = next(name for name, module in model.named_modules() if module is full)
        layout = layout_of(family_in(model))
        widths = layout.widths(model.config.to_dict())
        self.kept: dict[str, tuple[Tensor, ...]] = {}
        self.weights = nn.ParameterList()
        for name, weight in full.named_parameters():
            known = layout.segments(f"{path}.{name}".rpartition(".")[0]) is not None
            segments = layout.dimensions(f"{path}.{name}") if known else [["any"]] * weight.ndim
            stay = [kept_indices(widths, dimension, channels.at(layer)) for dimension in segments]
            indices = [
                torch.arange(size) if kept is None else torch.tensor(kept)
                for size, kept in zip(weight.shape, stay, strict=True)
            ]
            self.kept[name] = torch.meshgrid(*indices, indexing="ij")
            self.weights.append(nn.Parameter(weight.detach()[self.kept[name]]))

    def forward(self, x: Tensor) -> Any:
        return functional_call(self.full[0], dict(zip(self.kept, self.weights, strict=True)), (x,))

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the weights into the full-size module."""
        for (name, kept), weight in zip(self.kept.items(), self.weights, strict=True):
            own = self.full[0].get_parameter(name)
            own[kept] = weight.to(own)  # the training may have moved it to another device


class _Body(nn.Module):
    """A causal model without its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: Tensor) -> Any:
        return self.model.base_model(input_ids=input_ids, use_cache=False)


class _Loss:
    """The loss of a step: the relative distances of the streams from the dense model's."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, goals: Mapping[int, Tensor]) -> None:
        self.model, self.windows, self.goals = model, windows, goals

    @contextmanager
    def __call__(self, wrapped: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
        rows = rows_of(self.windows, batch)
        with watched(self.model, list(self.goals)) as seen:
            wrapped(input_ids=batch)
            distances = [
                relative_distance(seen[layer][1][:, 1:], goal[rows][:, 1:].to(batch.device))
                for layer, goal in self.goals.items()
            ]
            yield {"loss": torch.stack(distances).sum()}
