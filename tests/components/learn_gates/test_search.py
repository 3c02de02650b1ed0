"""The depth that a target allows: the deepest of the asked quality, the least of the asked speed or size, measured as it will be cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.learn_gates.search import bisect, next_token_accuracy, search
from components.lib.depth import Depth, Point, Search, holds
from components.lib.errors import Refusal
from components.lib.methods import Method
from components.lib.methods.last import Last
from components.lib.methods.sleb import Sleb
from components.lib.recipe.target import Target
from components.lib.transformer.checkpoint import Checkpoint, load_model
from components.lib.transformer.gates import bypassed
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import Selection
from components.lib.transformer.surgery import cut_checkpoint
from components.lib.transformer.text import load_windows
from tests.components.given import Given
from tests.components.lib.training.tiny import Written, counting, llama


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given.lay(tmp_path_factory.mktemp("run"))


class TestTheBisection:
    POSSIBLE = [Depth(part=step / 8, methods=(Sleb(ratio=step / 16),)) for step in range(1, 9)]  # noqa: RUF012

    def found(self, target: Target, values: list[float]) -> tuple[float, int]:
        """The depth that is found if each depth has its value, and how many were measured."""

        def measure(depth: Depth) -> Point:
            value = values[round(8 * depth.part) - 1]
            return Point(part=depth.part, ratios=depth.ratios, value=value, holds=holds(target, value))

        index, points = bisect(self.POSSIBLE, measure, target)
        return self.POSSIBLE[index].part, len(points)

    WORSE = [1.0, 1.05, 1.1, 1.2, 1.4, 1.8, 3.0, 9.0]  # noqa: RUF012

    @pytest.mark.parametrize(("bound", "part"), [(1.0, 1 / 8), (1.19, 3 / 8), (1.2, 4 / 8), (8.9, 7 / 8), (10, 1.0)])
    def test_finds_the_deepest_cut_of_the_asked_quality(self, bound: float, part: float) -> None:
        found, measured = self.found(Target(max_perplexity_ratio=bound), self.WORSE)
        assert found == part
        assert measured <= 4

    @pytest.mark.parametrize(("bound", "part"), [(1.0, 1 / 8), (1.19, 4 / 8), (9.0, 1.0)])
    def test_finds_the_least_cut_of_the_asked_speed(self, bound: float, part: float) -> None:
        assert self.found(Target(min_speedup=bound), self.WORSE)[0] == part

    @pytest.mark.parametrize(("bound", "part"), [(800, 2 / 8), (300, 7 / 8)])
    def test_finds_the_least_cut_of_the_asked_size(self, bound: int, part: float) -> None:
        assert self.found(Target(max_bytes=bound), [900.0 - 100 * step for step in range(8)])[0] == part

    def test_refuses_a_quality_that_the_least_cut_does_not_have(self) -> None:
        with pytest.raises(Refusal) as refusal:
            self.found(Target(max_perplexity_ratio=0.9), self.WORSE)
        assert str(refusal.value) == (
            "target.max_perplexity_ratio 0.9 does not hold at the least depth, methods.sleb.ratio 0.0625, where 1 was measured: "
            "ask for less quality, or name a transfer"
        )

    def test_refuses_a_speed_that_the_deepest_cut_does_not_have(self) -> None:
        with pytest.raises(Refusal, match=r"at the deepest cut .*methods\.sleb\.ratio 0\.5, .* or set larger ratios"):
            self.found(Target(min_speedup=20), self.WORSE)

    def test_takes_a_value_that_is_no_number_for_a_failure(self) -> None:
        assert self.found(Target(max_perplexity_ratio=2), [1.0] * 4 + [float("nan")] * 4)[0] == 4 / 8


def work(given: Given, out: Path, target: Target, method: Method | None = None) -> tuple[Selection, Search]:
    out.mkdir()
    search(
        given.release, given.windows, methods=[method or Last(ratio=0.75)], target=target, out=out, journal=Written()
    )
    found = Search.load(out)
    assert found
    return Selection.load(out), found


def test_a_quality_is_measured_on_windows_that_the_methods_do_not_see(given: Given, tmp_path: Path) -> None:
    selection, found = work(given, tmp_path / "out", Target(max_perplexity_ratio=1e9))
    model = load_model(given.release / "model")
    held = load_windows(given.windows)[-3:]
    with bypassed(model, selection.removed):
        without = perplexity(model, held, 8)
    assert selection.removed == (0, 1, 2)
    assert found.chosen.value == pytest.approx(without / perplexity(model, held, 8))
    assert found.next == {"last": pytest.approx(0.5)}


def test_the_transfer_is_applied_before_it_is_measured(given: Given, tmp_path: Path) -> None:
    plain = work(given, tmp_path / "plain", Target(max_perplexity_ratio=1e9), Last(ratio=0.5))[1]
    moved = work(given, tmp_path / "moved", Target(max_perplexity_ratio=1e9, transfer="ridge"), Last(ratio=0.5))[1]
    assert moved.chosen.value != plain.chosen.value


def test_bytes_are_those_of_the_cut_checkpoint(given: Given, tmp_path: Path) -> None:
    whole = Checkpoint.open(given.release / "model").bytes
    selection, found = work(given, tmp_path / "out", Target(max_bytes=whole - 1))
    assert selection.removed == (2,)
    cut_checkpoint(given.release / "model", tmp_path / "cut", selection.removed)
    assert found.chosen.value == Checkpoint.open(tmp_path / "cut").bytes
    assert found.next == {"last": pytest.approx(0.5)}


def test_a_speed_is_that_of_the_cut_model_beside_the_dense_one(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "components.learn_gates.search._seconds", lambda model, batch: float(model.config.num_hidden_layers)
    )
    selection, found = work(given, tmp_path / "out", Target(min_speedup=1.9))
    assert selection.removed == (1, 2)
    assert found.chosen.value == 2.0


def test_the_files_of_the_chosen_depth_alone_are_left(given: Given, tmp_path: Path) -> None:
    work(given, tmp_path / "out", Target(max_perplexity_ratio=1e9), Sleb(ratio=0.5))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"selection.json", "choice.json", "search.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_too_few_windows_to_hold_some_out_are_refused(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.learn_gates.search.load_windows", lambda folder: counting(3))
    with pytest.raises(Refusal, match=r"calibration\.samples is 3, .*: set it to 4 or more"):
        work(given, tmp_path / "out", Target(max_perplexity_ratio=2))


def test_the_accuracy_of_the_next_token_is_the_part_that_is_likeliest() -> None:
    model, windows = llama(), counting(5, 9)
    with torch.inference_mode():
        likeliest = model(input_ids=windows).logits[:, :-1].argmax(-1)
    assert next_token_accuracy(model, windows, 2) == pytest.approx((likeliest == windows[:, 1:]).float().mean().item())
