"""Write the tables of docs/families.md from the table of families and the list of refused types, so that they cannot drift from them.

python -m components.lib.transformer.docs
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from components.lib.transformer.families import FAMILIES, row_of
from components.lib.transformer.family import Family, no_heads, spelled_out, unchanged
from components.lib.transformer.unsupported import UNSUPPORTED
from components.lib.transformer.wrappers import WRAPPERS, Wrapper

PAGE = Path(__file__).parents[3] / "docs" / "families.md"

START = "<!-- {section}: written by python -m components.lib.transformer.docs -->"
END = "<!-- end of {section} -->"


def model_types() -> list[str]:
    """Return every type that transformers loads as a causal or an image-text model, sorted."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wrappers = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({*causal, *wrappers})


def page(text: str) -> str:
    """Return docs/families.md with its generated sections written anew."""
    for section, lines in {"supported": supported(), "wrappers": wrappers(), "refused": refused()}.items():
        start, end = START.format(section=section), END.format(section=section)
        written = "\n".join([start, "", *lines, "", end])
        before, _, rest = text.partition(start)
        text = f"{before}{written}{rest.partition(end)[2]}"
    return text


def supported() -> Iterator[str]:
    """Yield the counts, and a table with a row for each family."""
    import transformers

    types = model_types()
    found = sum(model_type in FAMILIES or model_type in WRAPPERS for model_type in types)
    yield (
        f"Of the {len(types)} model types that transformers {transformers.__version__} loads as causal or image-text models, {found} are "
        f"supported, {len(WRAPPERS)} of them as wrappers of another; {len(types) - found} are refused, each with a reason (below). "
        f"Of {_with_channels(types)} supported types channels can be removed, of {_with_experts(types)} experts."
    )
    yield ""
    yield "| `model_type` | families | what a cut of layers changes beside their number | axes beside layers |"
    yield "|---|---|---|---|"
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type):
        yield f"| `{family.model_type}` | {family.title} | {_changes(family)} | {axes(family)} |"


def _with_channels(types: list[str]) -> int:
    return sum(family.layout is not None for family in _rows(types))


def _with_experts(types: list[str]) -> int:
    return sum(family.experts for family in _rows(types))


def _rows(types: list[str]) -> list[Family]:
    return [row_of(kind, None) for kind in types if kind in FAMILIES or kind in WRAPPERS]


def _changes(family: Family) -> str:
    fields = {name: rule for name, rule in family.per_layer.items() if not name.startswith("_")}
    rewritten = [f"`{name}`" for name, rule in fields.items() if rule not in (no_heads, spelled_out, unchanged)]
    parts = [", ".join(rewritten)] if rewritten else []
    parts += [f"`{name}` is removed" for name, rule in fields.items() if rule is spelled_out]
    parts += [f"`{name}` becomes 0" for name, rule in fields.items() if rule is no_heads]
    return "; ".join(parts)


def axes(family: Family) -> str:
    """Say along which axes channels or experts can be removed."""
    if family.experts:
        return "`experts`"
    if family.layout is None:
        return "none"
    if family.layout.head is None:
        return "`ffn`; `hidden` and `heads` together"
    return "all; `hidden` stays a multiple of the heads" if family.layout.divides else "all"


def wrappers() -> Iterator[str]:
    """Yield a table with a row for each wrapper."""
    yield "| `model_type` | wrappers | text model | axes beside layers |"
    yield "|---|---|---|---|"
    for wrapper in sorted(WRAPPERS.values(), key=lambda wrapper: wrapper.model_type):
        yield f"| `{wrapper.model_type}` | {wrapper.title} | `{wrapper.text}` | {_axes_in(wrapper)} |"


def _axes_in(wrapper: Wrapper) -> str:
    family = row_of(wrapper.model_type, wrapper.text)
    layout = family.layout
    if family.experts:
        return "`experts`"
    if layout is None:
        return "none"
    return "`ffn`" if layout.head is None else "`ffn`, `heads`"


def refused() -> Iterator[str]:
    """Yield a table with a row for each reason, and the types that it refuses."""
    by_reason: dict[str, list[str]] = {}
    for model_type, reason in UNSUPPORTED.items():
        by_reason.setdefault(reason, []).append(f"`{model_type}`")
    yield "| it is refused, since it | `model_type` |"
    yield "|---|---|"
    for reason, types in by_reason.items():
        yield f"| {reason} | {', '.join(sorted(types))} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
