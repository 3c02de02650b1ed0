"""The numbers of a comparison: medians and ranges over the seeds, beside the dense model of the same cell."""

from __future__ import annotations

import csv
import io
import json

import pytest

from pipeline.compare.comparison import Comparison, Row, Spread, metrics, undominated


def row(comparison: Comparison, name: str, model: str = "candidate") -> Row:
    (found,) = [one for one in comparison.rows if (one.name, one.model) == (name, model)]
    return found


class TestTheRows:
    def test_are_dense_then_each_recipe_and_ratio_with_its_controls(self, comparison: Comparison) -> None:
        assert [(one.name, one.model) for one in comparison.rows] == [
            ("dense", "dense"),
            ("trsp 0.25", "candidate"),
            ("trsp 0.25", "pruned-first"),
            ("trsp 0.5", "candidate"),
            ("trsp 0.5", "pruned-first"),
            ("sleb 0.25", "candidate"),
            ("sleb 0.5", "candidate"),
        ]

    def test_follow_the_cells(self, comparison: Comparison) -> None:
        assert row(comparison, "sleb 0.25").done == 2
        fewer = comparison.model_copy(update={"cells": comparison.cells[:4]})
        assert row(fewer, "sleb 0.25").done == 1

    def test_count_the_seeds_that_are_measured(self, comparison: Comparison) -> None:
        assert (row(comparison, "trsp 0.25").done, row(comparison, "trsp 0.25").cells) == (2, 2)
        assert (row(comparison, "sleb 0.5").done, row(comparison, "sleb 0.5").cells) == (0, 2)

    def test_have_the_median_and_the_range_over_the_seeds(self, comparison: Comparison) -> None:
        found = row(comparison, "trsp 0.5")
        assert found.values["perplexity test"] == Spread(22.0, 20.0, 24.0)
        assert found.over_dense["perplexity test"] == Spread(2.2, 2.0, 2.4)

    def test_compare_a_speed_with_the_dense_model_of_the_same_cell(self, comparison: Comparison) -> None:
        found = row(comparison, "trsp 0.5")
        assert found.values["decode tok/s, batch 8"] == Spread(201.0, 200.0, 202.0)
        assert found.over_dense["decode tok/s, batch 8"] == Spread(2.0, 2.0, 2.0)


def test_undominated_points_are_beaten_by_no_other() -> None:
    points = {"dense": (1.0, 1.0), "good": (0.5, 1.2), "bad": (0.6, 1.3), "twin": (0.5, 1.2), "edge": (1.0, 1.1)}
    assert undominated(points) == {"dense", "good", "twin"}


def test_the_accuracies_have_their_mean_first(comparison: Comparison) -> None:
    model = comparison.cells[0].models["dense"]
    several = model.model_copy(update={"tasks": {"piqa": {"acc": 0.5}, "arc": {"acc_norm": 0.25}}})
    found = {name: value for name, value in metrics(several).items() if "accuracy" in name}
    assert list(found.items()) == [
        ("accuracy, mean of 2 tasks", 0.375),
        ("accuracy piqa", 0.5),
        ("accuracy arc", 0.25),
    ]


def test_the_csv_has_a_line_for_each_model_and_one_for_each_cell_without_any(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert len(lines) == 4 * 3 + 2 * 2 + 2
    assert lines[1] | {"recipe": "trsp", "seed": "0", "model": "candidate", "perplexity test": "11.0"} == lines[1]
    (failed,) = [line for line in lines if line["state"] == "failed"]
    assert (failed["reason"], failed["model"], failed["parameters"]) == ("prune: <b>other</b> logits", "", "")


def test_the_json_has_the_cells_and_the_rows(comparison: Comparison) -> None:
    written = json.loads(comparison.to_json())
    assert written["cells"][0]["models"]["candidate"]["perplexity"] == {"test": 11.0}
    assert written["rows"][1]["over_dense"]["parameters"] == {"median": 0.75, "low": 0.75, "high": 0.75}
    assert written["rows"][1]["values"]["perplexity test"]["median"] == pytest.approx(11.5)
