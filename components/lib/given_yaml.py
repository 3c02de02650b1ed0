"""YAML that a person wrote: recipes, profiles, lists of sources, task files.

    settings = parse_yaml(path.read_text())

YAML can hold more than a file of settings needs: aliases that unfold to billions of values, or a value within itself. Such a text is
refused here, before anything walks through it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LONGEST = 200_000
"""Characters of a file. A recipe has some thousand."""
MOST = 100_000
"""Values of a file, aliases unfolded."""


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Parse YAML into plain data.

    Raises:
        ValueError: the text is no YAML, too long, or unfolds to too much; the message says which, on one line.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, and {LONGEST} are the most")
    try:
        value = yaml.load(text, loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(short(" ".join(str(error).split()), 300)) from None
    try:
        values = _unfolded(value, {})
    except RecursionError:
        raise ValueError("a value of it contains itself, or it is nested too deeply") from None
    if values > MOST:
        raise ValueError(f"it unfolds to {values} values, and {MOST} are the most")
    return value


def read_yaml(path: Path) -> Any:
    """Read a file of YAML. Raises ValueError as `parse_yaml`, or if it is no text, and OSError if it cannot be read."""
    with path.open(encoding="utf-8") as file:
        return parse_yaml(file.read(LONGEST + 1))


def short(text: str, length: int = 200) -> str:
    """Return a text, cut if it is too long for a sentence."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """Count the values in plain data. An alias is the same object again, and counts again, but is walked through once."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
        known[id(value)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(value)]
