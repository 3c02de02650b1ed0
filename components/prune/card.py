"""The model card of a pruned checkpoint: its origin, what was removed, and how the result was verified."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from components.lib.report_parts import Lines, Part
from components.lib.transformer.layout import Widths
from components.lib.transformer.removal import NOUNS, Removal, in_words, percent, removals
from components.lib.transformer.selection import Selection

CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of the release's card that the card of a derived model repeats."""


def model_card(
    *,
    release: Mapping[str, Any],
    recipe: Mapping[str, Any],
    selection: Selection,
    widths: Widths | None,
    verification: Mapping[str, Any],
    wraps: bool = False,
    release_card: str = "",
    parts: Sequence[Part] = (),
) -> str:
    """Return the README.md of a pruned checkpoint. The same inputs give the same card.

    Args:
        release: `source`, `revision` (None if the source has none) and `digest` of the release; `dequantised` if its weights were stored
            in fp8 or mxfp4; `gguf`, the types of its weights, if it is a GGUF file; `taken_out_of`, the name of the wrapper, if only the text
            model of it was pinned.
        recipe: the recipe's sections that made this checkpoint, as plain data.
        selection: the removed layers and channels.
        widths: of the model before the cut; None if they are not known, and only layers were removed.
        verification: the content of `verification.json`: the number of remaining `layers`, the `channels` of
            each axis that was cut, and the checked values.
        wraps: whether the model wraps a text model with towers for other inputs.
        release_card: the release's own README.md; its licence and language are repeated.
        parts: what the methods add about their choice; sentences and tables are written, pictures are left out.
    """
    layers = int(verification["layers"]) + len(selection.removed)
    found = removals(selection, layers, widths)
    return _template().render(
        front_matter=yaml.safe_dump(
            _front_matter(release, selection, found, wraps, release_card), sort_keys=False
        ).strip(),
        wraps=wraps,
        release=release,
        selection=selection,
        removed=in_words(found),
        axes=[removal for removal in found if removal.axis != "layers"],
        shown=_shown(selection),
        layers=range(layers) if selection.removed else (),
        kept=[layer for layer in range(layers) if layer not in selection.removed],
        scores={name: values for name, values in selection.scores.items() if len(values) == layers},
        verification={
            name: value
            for name, value in verification.items()
            if name not in ("removed", "layers", "channels", "dropped")
        },
        dropped=verification.get("dropped", ()),
        narrowed={NOUNS[axis]: counts for axis, counts in verification.get("channels", {}).items()},
        parts=[part for part in parts if not isinstance(part, Lines)],
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip(),
    )


def _shown(selection: Selection) -> str:
    """Say how the full-size model is run for the comparison, so that it computes what the cut model computes."""
    layers = "those layers skipped"
    channels = f"those {'experts' if selection.channels.experts else 'channels'} gated to 0"
    if selection.removed and selection.channels:
        return f"{layers} and {channels}"
    return channels if selection.channels else layers


def _front_matter(
    release: Mapping[str, Any], selection: Selection, found: Sequence[Removal], wraps: bool, release_card: str
) -> dict[str, Any]:
    carried = front_matter(release_card)
    base = _hub_id(release)
    return {
        **{name: carried[name] for name in CARRIED if name in carried},
        **({"base_model": base} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if wraps else "text-generation",
        "tags": [
            "pruned",
            *(f"{removal.axis.removesuffix('s')}-pruning" for removal in found),
            *selection.method.split("+"),
        ],
    }


def front_matter(card: str) -> dict[str, Any]:
    """Return the YAML head of a model card; empty if there is none or if it cannot be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, flags=re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def _hub_id(release: Mapping[str, Any]) -> str | None:
    """Return the Hub id of a release that is pinned to a commit of the Hub, else None.

    The Hub refuses a `base_model` that is not the id of a repository.
    """
    name = str(release["source"]).partition("@")[0]
    commit = re.fullmatch(r"[0-9a-f]{40}", str(release["revision"]))
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(/.+\.gguf)?", name)
    return found[1] if commit and found else None


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML: the filters `code` and `text` keep values from being read as markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, readable=readable, score=score, text=text, percent=percent)
    return environment.get_template("card.md.j2")


def code(value: Any) -> str:
    """Format a value as a code span on one line; no character of the value can end the span or a cell of a table.

    >>> code("a`b|c")
    "`a'b/c`"
    """
    return f"`{' '.join(str(value).split()).replace('`', chr(39)).replace('|', '/')}`"


def text(value: str) -> str:
    r"""Format plain text on one line, so that no character of it is read as markup.

    >>> print(text("a | b_c"))
    a \| b\_c
    """
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(value.split()))


def readable(value: Any) -> str:
    """Format a checked value: whole numbers with a separator between thousands, differences as 3.1e-06, text as code."""
    if isinstance(value, float):
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else code(value)


def score(value: float) -> str:
    """Format the score of a layer. 0 means that the score was not measured: no measured score is exactly 0."""
    return f"{value:.4g}" if value else "–"
