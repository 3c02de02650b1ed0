"""docs/recipe.md says what the types say."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from components.lib.recipe.schema import Text
from pipeline.recipes import docs as recipe_docs


def test_the_page_in_the_repository_is_up_to_date() -> None:
    assert recipe_docs.PAGE.read_text() == recipe_docs.page(), "run: python -m pipeline.recipes.docs"


def test_every_section_has_a_table_with_all_of_its_fields() -> None:
    page = recipe_docs.page()
    for name, kind in recipe_docs.sections():
        heading = {"": "Sections", "text": "A text"}.get(name, f"`{name}`")
        table = page.split(f"## {heading}\n")[1].split("\n## ")[0]
        for field, info in kind.model_fields.items():
            [row] = [line for line in table.splitlines() if line.startswith(f"| `{field}` |")]
            assert row.endswith(f"| {' '.join((info.description or '').split()).replace('|', chr(92) + '|')} |")


def test_every_field_is_described() -> None:
    fields = [(name, field, info) for name, kind in recipe_docs.sections() for field, info in kind.model_fields.items()]
    assert [f"{name}.{field}" for name, field, info in fields if not info.description] == []


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (int, "integer"),
        (Annotated[float, Field(gt=0, lt=1)], "number > 0, < 1"),
        (Annotated[int, Field(ge=1)] | None, "integer ≥ 1"),
        (Literal["a", "b"], "`a` or `b`"),
        (tuple[str, ...], "list of string"),
        (dict[str, Text], "mapping of name to [text](#a-text)"),
        (dict[Literal["a", "b"], int], "mapping of `a` or `b` to integer"),
        (str | Annotated[tuple[str, ...], Field(min_length=1)], "string or list of string"),
    ],
)
def test_a_type_is_said_as_a_person_writes_it(annotation: object, said: str) -> None:
    assert recipe_docs.type_name(annotation) == said
