"""What a person sees of a run: one row a stage, and nothing of what frameworks print."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.lib.stage.events import EVENT, reported
from pipeline.runners.progress import ProgressDisplay, bar, cells_displayed, displayed


def event(stage: str, kind: str, **details: Any) -> str:
    return EVENT + json.dumps({"stage": stage, "event": kind, **details})


def plain() -> Console:
    """A console that is no terminal, such as a CI's."""
    return Console(file=io.StringIO(), width=100)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def follow(tmp_path: Path) -> Callable[..., ProgressDisplay]:
    """Follow a pipeline of three stages that prints these lines."""

    def follow(console: Console, *lines: str) -> ProgressDisplay:
        with displayed(tmp_path / "runs/one/log.txt", 3, console) as display:
            for line in lines:
                print(line)
        return display

    return follow


class TestAStagesEnd:
    def test_is_one_line_where_there_is_no_terminal(self, follow: Callable[..., ProgressDisplay]) -> None:
        console = plain()
        follow(
            console,
            event("calibrate", "opened"),
            event("calibrate", "reused"),
            event("learn_gates", "opened"),
            event("learn_gates", "started"),
            event("learn_gates", "progress", done=1, total=2, shown={"loss": 3.14159}),
            event("learn_gates", "done", seconds=12.34),
            event("lora_rft", "opened"),
            event("lora_rft", "skipped"),
        )
        assert shown(console).splitlines() == [
            "[ 1/3] calibrate: made before",
            "[ 2/3] learn gates: done in 12.3 s",
            "[ 3/3] lora rft: not asked for",
        ]

    def test_is_told_once(self, follow: Callable[..., ProgressDisplay]) -> None:
        console = plain()
        follow(console, event("control dense-trained", "reused"), event("control dense-trained", "skipped"))
        assert shown(console) == "[ 1/3] control dense-trained: made before\n"

    def test_is_a_full_bar_on_a_terminal(self, follow: Callable[..., ProgressDisplay]) -> None:
        console = terminal()
        follow(console, event("prune", "opened"), event("prune", "done", seconds=2))
        assert "✓ [ 1/3] prune" in shown(console)
        assert "done in 2.0 s" in shown(console)


def test_a_long_stage_shows_its_bar_and_its_numbers_while_it_runs(tmp_path: Path) -> None:
    console = terminal()
    with displayed(tmp_path / "log.txt", 3, console) as display:
        print(event("regularize", "progress", done=25, total=100, shown={"loss": 3.14159, "rate": 1e-4}))
        display.bars.refresh()
        assert "loss 3.142  rate 0.0001" in shown(console)
        task = display.bars.tasks[0]
        assert (task.completed, task.total) == (25, 100)


class TestTheLog:
    def test_takes_everything_that_is_printed(self, follow: Callable[..., ProgressDisplay], tmp_path: Path) -> None:
        console = plain()
        follow(console, "Loading weights: 100%", event("prune", "opened"), "a warning")
        assert (tmp_path / "runs/one/log.txt").read_text().splitlines() == [
            "Loading weights: 100%",
            event("prune", "opened"),
            "a warning",
        ]
        assert shown(console) == ""

    def test_takes_standard_error_too_and_a_last_line_without_an_end(self, tmp_path: Path) -> None:
        with displayed(tmp_path / "log.txt", 1, plain()):
            print("chatter", file=sys.stderr)
            print("and no end", end="")
        assert (tmp_path / "log.txt").read_text() == "chatter\nand no end"

    def test_of_an_earlier_attempt_is_kept(self, follow: Callable[..., ProgressDisplay], tmp_path: Path) -> None:
        follow(plain(), "first")
        follow(plain(), "second")
        assert (tmp_path / "runs/one/log.txt").read_text() == "first\nsecond\n"

    def test_is_whole_where_the_run_breaks(self, tmp_path: Path) -> None:
        with suppress(ZeroDivisionError), displayed(tmp_path / "log.txt", 1, plain()):
            print("before", end="")
            raise ZeroDivisionError
        assert (tmp_path / "log.txt").read_text() == "before"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_follows_standard_output_shows_on_it_and_not_in_the_log(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    console = Console(force_terminal=terminal, color_system=None, width=100)
    with displayed(tmp_path / "log.txt", 3, console) as display:
        print(event("prune", "done", seconds=2.0))
        display.bars.refresh()
        assert "prune" in own.getvalue()
    assert (tmp_path / "log.txt").read_text() == event("prune", "done", seconds=2.0) + "\n"
    console.print("afterwards")
    assert own.getvalue().endswith("afterwards\n")
    assert sys.stdout is own


class TestAnEvent:
    @pytest.mark.parametrize("before", ["    ", "Loading weights:  50%|███   | 3/6\r", "[KFP] "])
    def test_is_found_behind_what_kfp_and_frameworks_put_before_it(
        self, before: str, follow: Callable[..., ProgressDisplay]
    ) -> None:
        assert follow(plain(), before + event("pin", "refused", message="no such file")).refused == "no such file"

    def test_is_found_before_what_comes_after_it(self, follow: Callable[..., ProgressDisplay]) -> None:
        assert follow(plain(), event("pin", "refused", message="no such file") + " 50%").refused == "no such file"

    def test_that_arrives_in_pieces_is_one(self, tmp_path: Path) -> None:
        with displayed(tmp_path / "log.txt", 1, plain()) as display:
            whole = event("pin", "refused", message="no such file") + "\n"
            for piece in (whole[:5], whole[5:30], whole[30:]):
                sys.stdout.write(piece)
        assert display.refused == "no such file"

    def test_that_is_none_is_chatter(self, follow: Callable[..., ProgressDisplay]) -> None:
        console = plain()
        follow(console, f"{EVENT}is what begins a line", f"{EVENT}{{broken")
        assert shown(console) == ""


class TestAStageThatEndsBadly:
    def test_leaves_the_refusal_in_its_own_words(self, follow: Callable[..., ProgressDisplay]) -> None:
        display = follow(plain(), event("pin", "opened"), event("pin", "refused", message="the model [x] is gone"))
        assert (display.refused, display.failed) == ("the model [x] is gone", None)

    def test_leaves_the_first_failure_with_its_stage(self, follow: Callable[..., ProgressDisplay]) -> None:
        display = follow(
            plain(),
            event("prune", "failed", message="VerificationError: other logits"),
            event("finish", "failed", message="MlflowException: gone"),
        )
        assert display.failed == "prune: VerificationError: other logits"
        assert display.refused is None

    def test_tells_all_this_by_what_the_stages_themselves_print(self, tmp_path: Path) -> None:
        with displayed(tmp_path / "log.txt", 1, plain()) as display, pytest.raises(KeyError), reported("evaluate"):
            raise KeyError("perplexity")
        assert display.failed == "evaluate: KeyError: 'perplexity'"


class TestBar:
    def test_is_one_line_at_the_end_where_there_is_no_terminal(self) -> None:
        console = plain()
        with bar("making a release", console) as journal:
            journal.progress(1, 2, loss=3.0)
            journal.metrics({"loss": 3.0}, 1)
            journal.progress(2, 2, loss=2.0)
            assert shown(console) == ""
        assert re.fullmatch(r"making a release: done in \d+\.\d s\n", shown(console))

    def test_moves_with_its_numbers_on_a_terminal(self) -> None:
        console = terminal()
        with bar("making a release", console) as journal:
            journal.progress(1, 2, loss=3.14159)
        assert re.search(r"✓ making a release ━+ +done in \d+\.\d s", shown(console))

    def test_of_work_that_breaks_tells_no_end(self) -> None:
        console = plain()
        with pytest.raises(ZeroDivisionError), bar("making a release", console):
            raise ZeroDivisionError
        assert shown(console) == ""


def test_cells_side_by_side_have_a_row_each_with_their_stage() -> None:
    console = terminal()
    with cells_displayed(console) as display:
        display.at("trsp at 0.25", "pin")
        display.at("sleb at 0.25", "learn_gates")
        display.at("trsp at 0.25", "regularize")
        display.end("sleb at 0.25", "done (1 of 2 cells)")
    assert re.search("trsp at 0.25 .* regularize", shown(console))
    assert re.search("✓ sleb at 0.25 .* done \\(1 of 2 cells\\)", shown(console))
