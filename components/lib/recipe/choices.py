"""The parts of the recipe that name methods and transfers, each with its own settings: one field for each of their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, create_model, model_validator

from components.lib.methods import Method, known_methods
from components.lib.recipe.section import Section
from components.lib.transfers import Transfer, known_transfers


class ChosenMethods(Section):
    """The methods that choose layers or channels to remove, by name: one for layers, one for channels, or one of each."""

    @property
    def chosen(self) -> tuple[Method, ...]:
        """Return the named methods in the order in which they choose: layers, then channels."""
        named = (getattr(self, name) for name in type(self).model_fields)
        return tuple(sorted((method for method in named if method), key=lambda method: method.removes != "layers"))

    @model_validator(mode="after")
    def _one_of_each_kind(self) -> ChosenMethods:
        if not self.chosen:
            raise ValueError(f"methods names none: name one of {', '.join(known_methods())}")
        for kind in ("layers", "channels"):
            names = [method.name for method in self.chosen if method.removes == kind]
            if len(names) > 1:
                raise ValueError(f"methods {' and '.join(names)} both remove {kind}: name one of them")
        return self


class ChosenTransfer(Section):
    """The transfer that is named, if one is."""

    @property
    def chosen(self) -> Transfer | None:
        """Return the transfer with its settings; None if only training moves knowledge."""
        named = (getattr(self, name) for name in type(self).model_fields)
        return next((transfer for transfer in named if transfer), None)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if value in (None, "none"):
            return {}
        return {value: {}} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _at_most_one(self) -> ChosenTransfer:
        names = sorted(self.model_dump(exclude_none=True))
        if len(names) > 1:
            raise ValueError(f"transfer names {' and '.join(names)}: name one")
        return self


def _with_field_for_each(base: type[Section], name: str, known: Mapping[str, type[Section]]) -> type[Section]:
    fields: dict[str, Any] = {
        one: (kind | None, Field(None, description=(kind.__doc__ or "").partition("\n")[0]))
        for one, kind in known.items()
    }
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)


if TYPE_CHECKING:

    class Methods(ChosenMethods):
        """`ChosenMethods` with a field for each method."""

    class Transfers(ChosenTransfer):
        """`ChosenTransfer` with a field for each transfer."""

else:
    Methods = cast("type[ChosenMethods]", _with_field_for_each(ChosenMethods, "Methods", known_methods()))
    Transfers = cast("type[ChosenTransfer]", _with_field_for_each(ChosenTransfer, "Transfers", known_transfers()))
