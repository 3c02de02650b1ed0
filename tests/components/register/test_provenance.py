"""A version's card holds what was measured, in the two forms that the Hub reads, and its bill names what it was made of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from components.register.provenance import Source, papers
from components.register.report import Report

CANDIDATE = """---
license: apache-2.0
base_model: org/base
library_name: transformers
tags:
- pruned
---

# A smaller model

Text.
"""
COMMIT = "1" * 40
GIVEN: dict[str, Any] = {
    "name": "small",
    "digest": "a" * 64,
    "candidate_card": CANDIDATE,
    "sources": {"wikitext2": Source("Salesforce/wikitext", COMMIT), "technical": Source("/texts/technical.txt", None)},
}


@pytest.fixture
def measured(report: Report) -> Report:
    """A report with a task, and with texts that are pinned."""
    tasks = {"piqa": {"acc": 0.71, "acc_stderr": 0.01}}
    texts = {
        "calibration.data": f"s3://b/t@sha256:{'c' * 64}",
        "evaluate.perplexity.wikitext2": f"s3://b/t@sha256:{'d' * 64}",
    }
    return report.model_copy(
        update={
            "candidate": report.candidate.model_copy(update={"tasks": tasks}),
            "environment": report.environment | {"texts": texts},
        }
    )


def test_the_card_keeps_licence_and_lineage_and_has_the_results_in_its_head(measured: Report) -> None:
    card = ModelCard(papers(measured, **GIVEN)["README.md"])
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/base")
    found = {result.dataset_name: result for result in card.data.eval_results or ()}
    assert found["wikitext2"].metric_type == "perplexity"
    assert found["wikitext2"].metric_value == measured.candidate.perplexity["wikitext2"]
    assert (found["wikitext2"].dataset_type, found["wikitext2"].dataset_revision) == ("Salesforce/wikitext", COMMIT)
    assert found["technical"].dataset_type == "technical"
    assert found["piqa"].metric_value == 0.71
    assert len(found) == 3


def test_its_table_sets_the_dense_model_beside_the_candidate(measured: Report) -> None:
    text = papers(measured, **GIVEN)["README.md"]
    assert "| wikitext2 | perplexity | 59.41 | 58.72 |" in text
    assert "# A smaller model" in text
    assert f"verdict on the rules of the recipe: {measured.verdict.word}" in text


def test_the_hub_gets_the_results_on_its_own_data_sets_alone(measured: Report) -> None:
    [entry] = parse_eval_result_entries(yaml.safe_load(papers(measured, **GIVEN)["eval_results.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("Salesforce/wikitext", "wikitext2_perplexity")
    assert entry.value == measured.candidate.perplexity["wikitext2"]
    assert entry.dataset_revision == COMMIT


def test_the_bill_names_release_data_and_libraries(measured: Report) -> None:
    found = json.loads(papers(measured, **GIVEN)["bom.cdx.json"])
    model = found["metadata"]["component"]
    assert model["hashes"][0]["content"] == "a" * 64
    assert model["pedigree"]["ancestors"][0]["name"] == measured.release.source
    assert {part["name"] for part in found["components"]} == {
        "calibration.data",
        "evaluate.perplexity.wikitext2",
        "torch",
        "transformers",
        "espalier",
    }


def test_the_same_report_gives_the_same_files(measured: Report) -> None:
    assert papers(measured, **GIVEN) == papers(measured, **GIVEN)
