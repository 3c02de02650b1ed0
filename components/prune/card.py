"""The model card of a pruned checkpoint: what it is, where it comes from, what was removed and what was checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from components.lib.transformer.layout import Widths
from components.lib.transformer.removal import Removal, in_words, percent, removals
from components.lib.transformer.selection import Selection

CARRIED = ("license", "license_name", "license_link", "language")
"""What a derived model's card must or should repeat of its release's."""


def model_card(
    *,
    release: Mapping[str, Any],
    recipe: Mapping[str, Any],
    selection: Selection,
    widths: Widths | None,
    verification: Mapping[str, Any],
    release_card: str = "",
) -> str:
    """Return the README.md of a pruned checkpoint. The same inputs give the same card.

    Args:
        release: `source`, `revision` (None where the source has none) and `digest` of what was pruned.
        recipe: the recipe's sections that made this checkpoint, as plain data.
        selection: what was removed.
        widths: of what was pruned; None where they are not known, and only layers were removed.
        verification: `verification.json`: `layers` left, and what was compared.
        release_card: the release's own README.md, whose licence and language are carried over.
    """
    layers = int(verification["layers"]) + len(selection.removed)
    found = removals(selection, layers, widths)
    return _template().render(
        front_matter=yaml.safe_dump(_front_matter(release, selection, found, release_card), sort_keys=False).strip(),
        release=release,
        selection=selection,
        removed=in_words(found),
        axes=[removal for removal in found if removal.axis != "layers"],
        shown=_shown(selection),
        layers=range(layers) if selection.removed else (),
        kept=[layer for layer in range(layers) if layer not in selection.removed],
        scores={name: values for name, values in selection.scores.items() if len(values) == layers},
        verification={name: value for name, value in verification.items() if name not in ("removed", "layers")},
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip(),
    )


def _shown(selection: Selection) -> str:
    """How the model that was cut stands in for the cut one, when the two are compared."""
    layers, channels = "those layers skipped", "those channels gated to 0"
    if selection.removed and selection.channels:
        return f"{layers} and {channels}"
    return channels if selection.channels else layers


def _front_matter(
    release: Mapping[str, Any], selection: Selection, found: Sequence[Removal], release_card: str
) -> dict[str, Any]:
    carried = front_matter(release_card)
    base = _hub_id(release)
    return {
        **{name: carried[name] for name in CARRIED if name in carried},
        **({"base_model": base} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "pruned",
            *(f"{removal.axis.removesuffix('s')}-pruning" for removal in found),
            *selection.method.split("+"),
        ],
    }


def front_matter(card: str) -> dict[str, Any]:
    """Return the YAML head of a model card; empty where there is none or where it cannot be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, flags=re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def _hub_id(release: Mapping[str, Any]) -> str | None:
    """The Hub id of a release that was pinned to a commit of the Hub; the Hub refuses any other `base_model`."""
    name = str(release["source"]).partition("@")[0]
    commit = re.fullmatch(r"[0-9a-f]{40}", str(release["revision"]))
    return name if commit and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown: `code` keeps names from being read as markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, plain=plain, score=score, percent=percent)
    return environment.get_template("card.md.j2")


def code(value: Any) -> str:
    """A code span: on one line, and nothing in it ends it or a table's cell.

    >>> code("a`b|c")
    "`a'b/c`"
    """
    return f"`{' '.join(str(value).split()).replace('`', chr(39)).replace('|', '/')}`"


def plain(value: Any) -> str:
    """A checked value as a person reads it: whole numbers with their thousands apart, small differences as 3.1e-06."""
    if isinstance(value, float):
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else code(value)


def score(value: float) -> str:
    """A layer's score; a perplexity of 0 stands for one that was not measured, and no other score is exactly 0."""
    return f"{value:.4g}" if value else "–"
