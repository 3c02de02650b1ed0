"""Remove channels and experts: how many an axis loses, which rows of each tensor those are, and the config of the cut model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal
from components.lib.transformer.experts import experts_of, fewer_experts, kept_experts
from components.lib.transformer.families import Config, Family
from components.lib.transformer.layout import LLAMA, Axis, Layout, Widths, axis_of, text_part, with_text
from components.lib.transformer.selection import AXES, Channels

if TYPE_CHECKING:
    from components.lib.transformer.checkpoint import PrunableCheckpoint

ALIGNED = 8
"""The kept width is a multiple of this if the recipe names none: the matrix units of GPUs work on such blocks."""


def layout_of(family: Family) -> Layout:
    """Return a family's layout. Raises Refusal, with the reason, if it has none."""
    if family.layout is not None:
        return family.layout
    if family.layers_only:
        raise Refusal(
            f"{family.title} {family.layers_only}, from which whole layers can be removed and channels cannot: use the method trsp"
        )
    raise Refusal(
        f"the row {family.model_type!r} of components/lib/transformer/families.py has no layout, so the channels of {family.title} are not "
        "known: use the method trsp, which removes layers, or add the layout there (docs/families.md shows how)"
    )


def widths_of(family: Family, config: Config) -> Widths:
    """Return the widths that a config states, with the number of experts if the family can lose some. Raises Refusal as `layout_of`."""
    if not family.experts:
        return layout_of(family).widths(config)
    return replace((family.layout or LLAMA).widths(config), experts=experts_of(family, config).count)


def channels_to_remove(
    family: Family, config: Config, ratios: Mapping[Axis, float], multiple: int | None
) -> dict[Axis, int]:
    """Return how many channels each axis loses: the nearest number to its ratio that leaves a width the model can have.

    - hidden and ffn keep a multiple of `multiple`; heads are removed in whole key-value groups; experts as many from each group of them.
    - If the transformers class computes a head's width as hidden / heads, the two axes shrink together: whichever is asked for,
      whole heads are removed, and as many times their width of the hidden channels.
    - If the config class requires a hidden width that is a multiple of the heads, it stays one.

    Args:
        family: the model's row.
        config: its config.json.
        ratios: the part of each axis to remove.
        multiple: None for `ALIGNED`.

    Raises:
        Refusal: the family has no layout, no such width is near the ratio, or two ratios contradict each other.
    """
    if "experts" in ratios:
        experts = experts_of(family, config)
        if len(ratios) > 1:
            raise Refusal(
                f"methods.dress.axes names experts beside others, and of {family.title} no other channels can be removed: name experts alone"
            )
        return {"experts": experts.count - _nearest("experts", ratios["experts"], experts.count, experts.possible())}
    layout = layout_of(family)
    if family.wraps and ("hidden" in ratios or (layout.head is None and "heads" in ratios)):
        raise Refusal(
            f"methods.dress.ratio removes hidden channels, and in {family.title} the projector of the other towers writes them: name ffn"
            f"{'' if layout.head is None else ' or heads'} alone, or remove layers"
        )
    widths = layout.widths(config)
    shared = widths.heads // widths.groups
    multiple = multiple or ALIGNED
    kept: dict[Axis, int] = {}
    if "ffn" in ratios:
        kept["ffn"] = _nearest("ffn", ratios["ffn"], widths.ffn, range(multiple, widths.ffn, multiple))
    if layout.head is None and ("hidden" in ratios or "heads" in ratios):
        asked = {ratios[axis] for axis in ("hidden", "heads") if axis in ratios}
        if len(asked) > 1:
            raise Refusal(
                f"methods.dress.ratio is {ratios['hidden']} for hidden and {ratios['heads']} for heads, but {family.title} states no width of a "
                "head, so that the two shrink together: give them one ratio"
            )
        kept["heads"] = _nearest("heads", asked.pop(), widths.groups, range(1, widths.groups))
        kept["hidden"] = kept["heads"] * shared * widths.head
    else:
        if "heads" in ratios:
            # A hidden width that is cut too can follow; one that is not must already be a multiple.
            fits = "hidden" in ratios or not layout.divides
            groups = [count for count in range(1, widths.groups) if fits or widths.hidden % (count * shared) == 0]
            kept["heads"] = _nearest("heads", ratios["heads"], widths.groups, groups)
        if "hidden" in ratios:
            step = lcm(multiple, kept.get("heads", widths.groups) * shared) if layout.divides else multiple
            kept["hidden"] = _nearest("hidden", ratios["hidden"], widths.hidden, range(step, widths.hidden, step))
    return {axis: widths.of(axis) - kept[axis] for axis in AXES if axis in kept}


def check_channels(checkpoint: PrunableCheckpoint, ratios: Mapping[Axis, float], multiple: int | None) -> None:
    """Refuse, before any work, a checkpoint from which the channels that a recipe asks for cannot be cut.

    Raises:
        Refusal: `channels_to_remove` refuses the ratios, or `kept_rows` refuses a tensor.
    """
    removed = channels_to_remove(checkpoint.family, checkpoint.config, ratios, multiple)
    if "experts" in removed:
        count = experts_of(checkpoint.family, checkpoint.config).count
        for name, tensor in checkpoint.tensors.items():
            if checkpoint.family.block_of(name) and name not in checkpoint.ignored:
                kept_experts(count, name, tensor.shape, (0,))
        return
    layout = layout_of(checkpoint.family)
    widths = layout.widths(checkpoint.config)
    in_blocks = {axis: tuple(range(count)) for axis, count in removed.items()}
    outside: dict[Axis, tuple[int, ...]] = {"hidden": in_blocks.get("hidden", ())}
    for name, tensor in checkpoint.tensors.items():
        if name in checkpoint.ignored:
            continue
        kept_rows(layout, widths, name, tensor.shape, in_blocks if checkpoint.family.block_of(name) else outside)


FAR = 0.1
"""The largest distance of a width from the requested ratio: a larger one would be another experiment."""


_OTHER_CURES: Mapping[Axis, str] = dict.fromkeys(
    ("hidden", "ffn", "heads"), ", methods.dress.multiple lower, or cut hidden and heads together"
)


def _nearest(axis: Axis, ratio: float, width: int, allowed: Sequence[int]) -> int:
    near = sorted(allowed, key=lambda count: abs(1 - count / width - ratio))
    if not near or abs(1 - near[0] / width - ratio) > FAR:
        can = ", ".join(f"{1 - count / width:.2g}" for count in sorted(near[:4], reverse=True)) or "none"
        raise Refusal(
            f"of the {width} channels of the axis {axis} no number near {ratio:.0%} can go (possible parts are {can}): set methods.dress.ratio to "
            f"one of them{_OTHER_CURES.get(axis, '')}"
        )
    return near[0]


def kept_rows(
    layout: Layout, widths: Widths, tensor: str, shape: Sequence[int], removed: Mapping[Axis, Sequence[int]]
) -> list[list[int] | None]:
    """Return, for each dimension of a tensor, the indices that stay, or None if all stay.

    Only dimensions along the removed axes must be known: a model with other tensors beside them (StableLM's norms of single heads), or with
    an embedding of another width (OPT-350m), can still lose ffn channels.

    Args:
        layout: the family's.
        widths: the model's.
        tensor: its name.
        shape: its shape, as stored.
        removed: the channels to remove (`Channels.at`).

    Raises:
        Refusal: the tensor may hold channels to remove and the layout does not know it, or its shape contradicts the widths.
    """
    if max(shape, default=1) == 1 or not layout.speaks_of(
        tensor
    ):  # a single number, such as a scale; or another tower's
        return [None] * len(shape)
    axes = {axis for axis, channels in removed.items() if channels}
    if layout.segments(tensor.rpartition(".")[0]) is None and not _may_hold(axes, widths, shape):
        return [None] * len(shape)
    dimensions = layout.dimensions(tensor)
    stated = [
        sum(widths.size(segment) for segment in segments) if axes & {axis_of(segment) for segment in segments} else 0
        for segments in dimensions
    ]
    if len(stated) != len(shape) or any(size and size != found for size, found in zip(stated, shape, strict=True)):
        raise Refusal(
            f"the tensor {tensor} has the shape {tuple(shape)}, but the config's widths give {tuple(stated)}: its channels cannot be "
            "told apart, remove layers instead"
        )
    return [kept_indices(widths, segments, removed) for segments in dimensions]


def _may_hold(axes: Collection[Axis], widths: Widths, shape: Sequence[int]) -> bool:
    """Say whether a tensor that the layout does not know may hold channels of `axes`.

    Intermediate channels lie side by side, so a tensor that holds them has a dimension at least as long as there are channels. Heads can
    have a tensor each, and any tensor may be as wide as the residual stream: of those axes nothing is ruled out.
    """
    return bool(axes) and (axes != {"ffn"} or max(shape, default=0) >= widths.ffn)


def kept_indices(widths: Widths, segments: Sequence[str], removed: Mapping[Axis, Sequence[int]]) -> list[int] | None:
    """Return the indices that stay of a dimension made of `segments`, or None if all stay."""
    axes = [axis_of(segment) for segment in segments]
    if not any(axis and removed.get(axis) for axis in axes):
        return None
    rows: list[int] = []
    start = 0
    for segment, axis in zip(segments, axes, strict=True):
        gone = set(removed.get(axis, ())) if axis else set()
        unit = widths.unit(segment)
        for channel in range(widths.size(segment) // unit):
            if channel not in gone:
                rows.extend(range(start + channel * unit, start + (channel + 1) * unit))
        start += widths.size(segment)
    return rows


def cut_widths(config: Config, family: Family, channels: Channels) -> dict[str, Any]:
    """Return the config of the model without `channels`, experts among them."""
    fewer = fewer_experts(family, config, channels.count("experts")) if channels.experts else {}
    config = with_text(config, {**text_part(config), **fewer})
    if not channels.narrow:
        return config
    layout = layout_of(family)
    widths = layout.widths(config)
    hidden, groups = widths.hidden - channels.count("hidden"), widths.groups - channels.count("heads")
    # An embedding narrower than the stream keeps its width when the stream does.
    cut: dict[str, Any] = dict.fromkeys(layout.hidden, hidden) if channels.hidden else {}
    cut[layout.ffn] = widths.ffn - channels.count("ffn")
    cut[layout.heads] = groups * (widths.heads // widths.groups)
    if layout.groups:
        cut[layout.groups] = groups
    if layout.head:
        cut[layout.head] = widths.head
    return with_text(config, dict(text_part(config)) | cut)
