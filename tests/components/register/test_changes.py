"""What differs between two versions is named part by part, and figures that were measured otherwise are not compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.lib.errors import Refusal
from components.lib.store.store import Store
from components.lib.tracking.registry import Version
from components.register.changes import Change, changes, report_of
from components.register.report import Report
from tests.components.register.conftest import (
    ENVIRONMENT,
    RECIPE,
    RELEASE,
    build_both,
    build_report,
    measurements,
    write_run,
)

MEASURED = {
    **ENVIRONMENT,
    "code": {"regularize": "a" * 64},
    "speed": {"prompt": 512, "generate": 32},
    "texts": {"evaluate.perplexity.wikitext2": f"s3://b/texts/1@sha256:{'1' * 64}"},
    "digests": {"wikitext2": "1" * 64},
}


def report(folder: Path, recipe: str = RECIPE, models: dict[str, Any] | None = None, **environment: Any) -> Report:
    return build_report(write_run(folder, models), recipe, environment={**MEASURED, **environment})


def test_two_equal_versions_differ_in_nothing(tmp_path: Path) -> None:
    assert changes(report(tmp_path / "a"), report(tmp_path / "b")) == []


def test_each_part_is_named_with_both_values(tmp_path: Path) -> None:
    models = measurements()
    models["candidate"]["perplexity"]["wikitext2"] = 117.44
    texts = {"evaluate.perplexity.wikitext2": f"s3://b/texts/2@sha256:{'2' * 64}"}
    now = report(
        tmp_path / "now",
        RECIPE.replace("ratio: 0.25", "ratio: 0.5"),
        models,
        code={"regularize": "b" * 64, "prune": "c" * 64},
        versions={"torch": "2.14.0", "transformers": "5.23.0", "espalier": "0.1.0"},
        texts=texts,
    )
    now = now.model_copy(update={"release": now.release.model_copy(update={"revision": "main2"})})
    assert changes(report(tmp_path / "before"), now) == [
        Change("release", "revision", "–", "main2"),
        Change("recipe", "methods.trsp.ratio", "0.25", "0.5"),
        Change("data", "evaluate.perplexity.wikitext2", "1" * 12, "2" * 12),
        Change("code", "prune", "–", "c" * 12),
        Change("code", "regularize", "a" * 12, "b" * 12),
        Change("library", "torch", "2.13.0", "2.14.0"),
        Change("figure", "perplexity wikitext2", "58.72", "117.4", "2.000×"),
    ]


@pytest.mark.parametrize(
    ("environment", "note"),
    [
        ({"length": 512}, "measured with windows of 512 tokens, not of 256"),
        ({"digests": {"wikitext2": "2" * 64}}, "measured on another text than wikitext2 is now"),
    ],
)
def test_figures_that_were_measured_otherwise_have_no_ratio(
    environment: dict[str, Any], note: str, tmp_path: Path
) -> None:
    models = measurements()
    models["candidate"]["perplexity"]["wikitext2"] = 60.0
    found = changes(report(tmp_path / "a"), report(tmp_path / "b", models=models, **environment))
    assert [one.note for one in found if one.name == "perplexity wikitext2"] == [note]


def test_what_was_removed_is_compared_along_each_axis(tmp_path: Path) -> None:
    now = build_both(tmp_path / "both").model_copy(update={"environment": MEASURED})
    found = [one for one in changes(report(tmp_path / "layers"), now) if one.part == "removed"]
    assert found == [Change("removed", "ffn", "–", "172 of 684")]


def test_a_version_whose_report_is_not_in_this_store_is_refused(store: Store) -> None:
    version = Version("m", "1", "s3://b/model", (), {"espalier.run": "one"})
    with pytest.raises(Refusal, match=r"version 1 of m has no report in the store s3://.*ESPALIER_BUCKET"):
        report_of(version, store)


def test_a_report_is_found_by_its_run(store: Store, tmp_path: Path) -> None:
    made = report(tmp_path)
    store.write_text("runs/one/report.json", made.to_json())
    assert report_of(Version("m", "1", "s3://b/model", (), {"espalier.run": "one"}), store) == made
    assert json.loads(made.to_json())["release"]["source"] == RELEASE["source"]
