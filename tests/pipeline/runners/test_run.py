"""A target that the whole recipe does not confirm: a second attempt one depth before, and no third."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.lib.store.runs import item_of, leave_item
from components.lib.store.store import Store
from pipeline.kubeflow.profile import Profile
from pipeline.runners.run import check_processes, run
from tests.components.lib.transformer import zoo
from tests.components.register.test_searched import SEARCH, reported


@dataclass
class Confirming:
    """A runner that only leaves a report: the target holds at a ratio of `holds` or less."""

    scratch: Path
    holds: float
    embeds: bool = True
    asked: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def services(self, home: Path) -> Iterator[Mapping[str, str]]:
        yield {}

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        ratio = parse_recipe(arguments["recipe"]).methods.chosen[0].asked("layers") or 0.0
        self.asked.append((arguments["run"], ratio))
        report = reported(self.scratch / arguments["run"], 1.2 if ratio <= self.holds else 1.1, SEARCH)
        store = Store.from_environment()
        store.write_text(f"runs/{arguments['run']}/report.json", report.to_json())
        store.write_text(f"runs/{arguments['run']}/report.html", "")


@pytest.fixture
def recipe_text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("w3 w4 w5")
    text = tmp_path / "text.txt"
    return f"""
methods: {{trsp: {{ratio: 0.25}}}}
target: {{max_perplexity_ratio: 1.2}}
calibration: {{data: {text}, samples: 4, length: 32}}
evaluate: {{perplexity: {{test: {text}}}, speed: {{enabled: false}}}}
"""


@pytest.mark.parametrize(("holds", "ratios"), [(0.25, [0.25]), (0.125, [0.25, 0.125]), (0.01, [0.25, 0.125])])
def test_a_second_attempt_asks_for_the_next_ratio(
    holds: float, ratios: list[float], recipe_text: str, store: Store, tmp_path: Path, shown: Console
) -> None:
    release = zoo.release(zoo.SPECIMENS[0].model(layers=8), tmp_path / "release")
    runner = Confirming(tmp_path / "reports", holds)
    leave_item("one", "item", store)
    result = run(parse_recipe(recipe_text), str(release), "small", tmp_path / "home", shown, "one", runner)
    assert [ratio for _, ratio in runner.asked] == ratios
    last = runner.asked[-1][0]
    assert (result.folder.name, item_of(last, store)) == (last, "item")
    assert result.report.verdict.target_holds == (holds >= 0.125)


def test_a_comparison_makes_no_second_attempt(recipe_text: str, store: Store, tmp_path: Path, shown: Console) -> None:
    release = zoo.release(zoo.SPECIMENS[0].model(layers=8), tmp_path / "release")
    runner = Confirming(tmp_path / "reports", 0.01)
    run(parse_recipe(recipe_text), str(release), None, tmp_path / "home", shown, "one", runner)
    assert len(runner.asked) == 1


def test_an_optimizer_that_the_processes_cannot_share_is_refused_before_anything_starts(
    recipe_text: str, tmp_path: Path, shown: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = zoo.release(zoo.SPECIMENS[0].model(layers=8), tmp_path / "release")
    runner = Confirming(tmp_path / "reports", 0.25)
    monkeypatch.setenv("ESPALIER_PARALLEL", "fsdp")
    monkeypatch.setenv("ESPALIER_PROCESSES", "2")
    asked = parse_recipe(recipe_text, ["regularize.optimizer=adamw-8bit"])
    with pytest.raises(Refusal, match=r"^regularize.optimizer is adamw-8bit, .* among the 2 processes of regularize"):
        run(asked, str(release), None, tmp_path / "home", shown, "one", runner)
    assert runner.asked == []


@pytest.mark.parametrize(
    ("environment", "processes"), [({}, 16), ({"ESPALIER_PROCESSES": "2"}, 4), ({"ESPALIER_PARALLEL": "none"}, 1)]
)
def test_a_profile_says_how_many_processes_there_are(
    recipe_text: str, environment: dict[str, str], processes: int
) -> None:
    fields = {"ESPALIER_BUCKET": "b", "ESPALIER_PARALLEL": "fsdp"} | environment
    stages = {"regularize": {"gpu": {"count": 8}, "nodes": 2}}
    profile = Profile.model_validate({"environment": fields, "stages": stages})
    assert profile.processes("regularize") == processes
    asked = parse_recipe(recipe_text, ["regularize.optimizer=adamw-8bit"])
    if processes > 1:
        with pytest.raises(Refusal, match=f"among the {processes} processes of regularize"):
            check_processes(asked, profile)
    else:
        check_processes(asked, profile)
