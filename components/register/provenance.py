"""The papers of a registered version: its model card with the results of the evaluation, and its bill of materials.

The candidate's own card was written before it was evaluated and is part of its digest, so these files lie beside the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from components.lib.provenance.bom import bill_of_materials
from components.register.format import number_or_count
from components.register.report import Report

CARD, EVAL_RESULTS, BILL = "README.md", "eval_results.yaml", "bom.cdx.json"
"""The names of the files; on the Hub the second lies in the folder `.eval_results`."""


@dataclass(frozen=True)
class Source:
    """Where the text of a measurement comes from."""

    name: str
    """A Hub id, an S3 address or a path."""
    revision: str | None

    @property
    def of_hub(self) -> bool:
        """Return True if it is a data set of the Hub at a commit."""
        return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and re.fullmatch(r"[0-9a-f]{40}", str(self.revision)))


@dataclass(frozen=True)
class Result:
    """One number of the candidate."""

    measured_on: str
    """The text's name or the task's."""
    metric: str
    value: float
    dense: float | None
    """The dense model's, from the same evaluation."""
    source: Source | None
    """Of the text; None for a task."""


def papers(
    report: Report, *, name: str, digest: str, candidate_card: str, sources: Mapping[str, Source]
) -> dict[str, str]:
    """Return the files by name. The same report gives the same files.

    Args:
        report: the run's.
        name: the registered model's name.
        digest: sha256 of the candidate's artifact.
        candidate_card: the README.md of the candidate.
        sources: where the texts come from, by their names in `evaluate.perplexity`; a text may be missing.
    """
    card = ModelCard(candidate_card)
    found = list(_results(report, sources))
    # Before the card is written again: it turns one value into the type that it expects.
    licence = card.data.get("license_name") or card.data.get("license")
    return {
        CARD: _evaluated(card, name, report, found),
        EVAL_RESULTS: _eval_results(report, found),
        BILL: _bill(report, name, digest, licence),
    }


def _results(report: Report, sources: Mapping[str, Source]) -> Iterator[Result]:
    """Yield every number of the candidate's quality that there is."""
    for text, value in report.candidate.perplexity.items():
        if value is not None:
            yield Result(text, "perplexity", value, report.dense.perplexity.get(text), sources.get(text))
    for task, metrics in report.candidate.tasks.items():
        for metric, value in metrics.items():
            if value is not None and "stderr" not in metric:
                yield Result(task, metric, value, report.dense.tasks.get(task, {}).get(metric), None)


def _evaluated(card: ModelCard, name: str, report: Report, results: list[Result]) -> str:
    """Return the card with the results in its head (`model-index`) and as a table at its end."""
    card.data.model_name = name
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.source.name if result.source and result.source.of_hub else result.measured_on,
            dataset_name=result.measured_on,
            dataset_revision=result.source.revision if result.source and result.source.of_hub else None,
            metric_type=result.metric,
            metric_value=result.value,
            metric_name=f"{result.metric} ({result.measured_on})",
        )
        for result in results
    ]
    rows = "".join(
        f"| {result.measured_on} | {result.metric} | {number_or_count(result.dense)} | {number_or_count(result.value)} |\n"
        for result in results
    )
    said = f"The verdict on the rules of the recipe: {report.verdict.word}. {_context(report)}\n"
    table = f"| measured on | metric | dense | this model |\n|---|---|---|---|\n{rows}"
    return f"{str(card).rstrip()}\n\n## Evaluation\n\n{said}\n{table}"


def _context(report: Report) -> str:
    versions = report.environment.get("versions", {})
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    length = report.recipe["evaluate"]["length"]
    return f"Both models were measured in one run, perplexity on windows of {length} tokens, with {known}."


def _eval_results(report: Report, results: list[Result]) -> str:
    """Return the results on data sets of the Hub in the form of its folder `.eval_results`; an empty list if there are none."""
    entries = [
        EvalResultEntry(
            dataset_id=result.source.name,
            task_id=f"{result.measured_on}_{result.metric}",
            value=result.value,
            dataset_revision=result.source.revision,
            notes=f"windows of {report.recipe['evaluate']['length']} tokens; dense model: {number_or_count(result.dense)}",
        )
        for result in results
        if result.source and result.source.of_hub
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def _bill(report: Report, name: str, digest: str, licence: str | None) -> str:
    texts = {field: str(text).rpartition(":")[2] for field, text in report.environment.get("texts", {}).items()}
    versions = report.environment.get("versions", {})
    return bill_of_materials(
        name=name,
        digest=digest,
        release={
            "source": report.release.source,
            "revision": report.release.revision,
            "digest": report.release.digest.removeprefix("sha256:"),
            "license": licence,
        },
        data={field: sha256 for field, sha256 in texts.items() if re.fullmatch(r"[0-9a-f]{64}", sha256)},
        libraries={library: version for library, version in versions.items() if version and library != "python"},
        settings={"method": report.selection.method, "verdict": report.verdict.word},
    )
