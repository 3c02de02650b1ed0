"""What the pages tell a person to write works, and what they point to is there."""

from __future__ import annotations

import itertools
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

from components.lib.methods import Method
from components.lib.training.journal import Silent
from components.lib.transformer.selection import NOTHING, Channels, Selection
from components.lib.transformer.surgery import cut_checkpoint
from pipeline.recompress import recompress
from pipeline.runners.graph import tasks_of
from tests.components.lib.training.tiny import counting
from tests.components.lib.transformer import zoo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def methods() -> list[str]:
    """The methods that docs/add-a-method.md shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-method.md").read_text(), flags=re.DOTALL)


def shown(code: str) -> type[Method]:
    """The class of a method that the page shows, found as it would be in its file."""
    module = types.ModuleType("shown")
    sys.modules["shown"] = module
    exec(compile(code, "docs/add-a-method.md", "exec", dont_inherit=True), vars(module))
    (kind,) = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method) and "name" in vars(kind)
    ]
    return kind


def chosen(kind: type[Method], before: Selection = NOTHING) -> Selection:
    """Let a method choose half of a tiny Llama of four layers."""
    model = zoo.SPECIMENS[0].model(layers=4)
    return kind(ratio=0.5).choose(model, counting(), before, journal=Silent(), out=None)


def test_the_methods_that_are_shown_choose_what_they_say(tmp_path: Path) -> None:
    last, last_channels = map(shown, methods())
    layers, channels = chosen(last), chosen(last_channels)
    both = chosen(last_channels, before=layers)
    assert (layers.method, layers.order) == ("last", (2, 1))
    assert (both.method, both.removed) == ("last+last-channels", (1, 2))
    assert [len(gone) for gone in both.channels.ffn[1:3]] == [0, 0]
    assert (layers.removed, layers.channels) == ((1, 2), Channels())
    assert channels.removed == ()
    assert channels.channels.axes == ("ffn",)
    assert channels.channels.count("ffn") == zoo.SPECIMENS[0].model().config.intermediate_size // 2
    cut_checkpoint(
        zoo.release(zoo.SPECIMENS[0].model(layers=4), tmp_path / "a"), tmp_path / "b", channels=channels.channels
    )


def test_the_method_of_layers_that_is_shown_is_the_shipped_one() -> None:
    assert methods()[0] == (ROOT / "components" / "lib" / "methods" / "last.py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def named_files(page: str) -> list[str]:
    """The paths between backticks that begin with a folder of the repository."""
    folders = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")))
    return re.findall(rf"`((?:{folders})/[^`\s]*)`", page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_files_that_exist(page: Path) -> None:
    """A placeholder, such as <stage>, stands for one name at least."""
    wildcards = {name: re.sub(r"<\w+>", "*", name) for name in named_files(page.read_text())}
    assert [name for name, wildcard in wildcards.items() if not any(ROOT.glob(wildcard))] == []


def test_architecture_names_the_rooms() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert {"components/lib/methods/", "components/lib/transfers/", "pipeline/recompress.py"} <= set(named_files(page))


def test_the_diagram_of_a_run_shows_every_task_and_no_arrow_that_the_pipeline_does_not_have() -> None:
    diagram = (ROOT / "docs" / "architecture.md").read_text().split("```mermaid\n")[1].split("```")[0]
    chains = [re.split(r"\s*-->\s*", line.strip()) for line in diagram.splitlines() if "-->" in line]
    drawn = {arrow for chain in chains for arrow in itertools.pairwise(chain)}
    tasks = {task.name: task for task in tasks_of(recompress)}
    assert {name for arrow in drawn for name in arrow} == set(tasks) - {"finish"}
    assert [(source, target) for source, target in drawn if source not in tasks[target].reads] == []


def test_every_test_of_make_quick_is_there() -> None:
    for line in (ROOT / "tests" / "quick.txt").read_text().splitlines():
        file, *names = line.partition("[")[0].split("::")
        assert (ROOT / file).exists(), line
        assert all(re.search(rf"\b(def|class) {name}\b", (ROOT / file).read_text()) for name in names), line


def test_the_changelog_has_the_version_that_is_installed_from_here() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
