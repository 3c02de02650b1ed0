"""A new file in a folder is a new method, and nothing else lists it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from components.lib.methods import LayerMethod, Method, known_methods
from components.lib.methods.sleb import Sleb
from components.lib.methods.trsp import Trsp
from components.lib.plugins import classes_of, module_of

LAST = """
from typing import ClassVar

from components.lib.methods import LayerMethod
from components.lib.methods.sleb import Sleb


class {name}(LayerMethod):
    name: ClassVar[str] = "{word}"


class Unnamed({name}):
    pass
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a method in a file, and one in a folder."""
    folder = tmp_path / "found_methods"
    (folder / "late").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "early.py").write_text(LAST.format(name="Early", word="early-ones"))
    (folder / "late/__init__.py").write_text(LAST.format(name="Late", word="late"))
    (folder / "late/work.py").write_text("raise RuntimeError('the work is not imported to find the settings')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "found_methods"
    for module in [name for name in sys.modules if name.startswith("found_methods")]:
        del sys.modules[module]


def test_each_file_and_each_folder_brings_its_class_by_its_name(package: str, tmp_path: Path) -> None:
    found = classes_of(package, tmp_path / package, Method)
    assert {name: kind.__name__ for name, kind in found.items() if kind is not Sleb} == {
        "early-ones": "Early",
        "late": "Late",
    }
    assert list(found) == sorted(found)


def test_a_base_without_a_name_is_none_of_them() -> None:
    assert LayerMethod not in known_methods().values()


def test_the_work_is_the_file_or_the_module_work_of_the_folder() -> None:
    assert module_of(Sleb) == "components.lib.methods.sleb"
    assert module_of(Trsp) == "components.lib.methods.trsp.work"
