"""The description of a version on MLflow's page: the verdict, the figures beside the other models', and the picture."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from components.lib.transformer.removal import in_words
from components.register.accuracy import mean_accuracy
from components.register.format import ABSENT, count, number, percent, times
from components.register.headline import verdict_sentence
from components.register.measured import Measured, ratio
from components.register.report import Report

PICTURE = "size-and-perplexity.svg"
"""The picture's name among the artifacts of the parent run."""


def describe(report: Report, run_id: str) -> str:
    """Return the description in Markdown. The same report gives the same text.

    Args:
        report: the run's report.
        run_id: the parent run in MLflow, which holds the report and the picture; empty if there is none.
    """
    paragraphs = [
        f"**{report.verdict.word.capitalize()}**: {verdict_sentence(report)}.",
        f"{report.release.source} without {in_words(report.removals())}. "
        f"Methods: {methods_with_ratios(report)}. Run: {report_link(run_id)}.",
        _table(report),
        _rules(report),
    ]
    if run_id and _has_picture(report):
        # Relative to the page, so that it is found under every address of the server.
        query = urlencode({"path": PICTURE, "run_uuid": run_id})
        paragraphs.append(f"![size and perplexity](get-artifact?{query})")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def methods_with_ratios(report: Report) -> str:
    """Return the methods with their ratios, or those that a search found: `trsp 0.25, dress ffn 0.5`."""
    methods = report.recipe.get("methods", {})
    asked = {name: settings.get("ratio") for name, settings in methods.items()}
    told = []
    for name, ratio_ in (report.search.chosen.ratios if report.search else asked).items():
        each = ratio_.items() if isinstance(ratio_, Mapping) else [("", ratio_)]
        told.append(" ".join([str(name), *(f"{axis} {value}".strip() for axis, value in each if value is not None)]))
    return ", ".join(told)


def report_link(run_id: str) -> str:
    """Return a Markdown link to the report among the artifacts of the run."""
    if not run_id:
        return "not in MLflow"
    return f"[report.html](get-artifact?{urlencode({'path': 'report.html', 'run_uuid': run_id})})"


def figures(report: Report) -> dict[str, dict[str, str]]:
    """Return the figures that matter, in words: name → model → value with its ratio to the dense model's."""
    models = report.models()
    rows: dict[str, dict[str, tuple[float | None, str]]] = {}
    for text in report.candidate.perplexity:
        rows[f"perplexity {text}"] = {
            name: (model.perplexity.get(text), number(model.perplexity.get(text))) for name, model in models.items()
        }
    if report.judged_tasks():
        found = {name: mean_accuracy(model.tasks, report.judged_tasks()) for name, model in models.items()}
        rows["accuracy"] = {
            name: (one.value if one else None, percent(one.value) if one else ABSENT) for name, one in found.items()
        }
    rows["bytes"] = {name: (model.bytes, f"{count(model.bytes)}B") for name, model in models.items()}
    rows["peak memory"] = {
        name: (model.peak_memory, f"{count(model.peak_memory)}B" if model.peak_memory else ABSENT)
        for name, model in models.items()
    }
    for phase in report.candidate.speed:
        for batch in report.candidate.speed[phase]:
            rows[f"{phase} tok/s, batch {batch}"] = {
                name: (speed := model.tokens_per_second(phase, batch), number(speed)) for name, model in models.items()
            }
    return {row: _beside(cells) for row, cells in rows.items()}


def ratios(report: Report) -> dict[str, float]:
    """Return the candidate's figures over the dense model's, those that were measured, by name."""
    dense, candidate = report.dense, report.candidate
    found: dict[str, float | None] = {
        f"perplexity {text}": ratio(value, dense.perplexity.get(text)) for text, value in candidate.perplexity.items()
    }
    one, other = (mean_accuracy(model.tasks, report.judged_tasks()) for model in (candidate, dense))
    if one and other and report.judged_tasks():
        found["accuracy"] = ratio(one.value, other.value)
    found |= {
        "bytes": ratio(candidate.bytes, dense.bytes),
        "peak memory": ratio(candidate.peak_memory, dense.peak_memory),
    }
    for phase in candidate.speed:
        for batch in candidate.speed[phase]:
            speeds = (model.tokens_per_second(phase, batch) for model in (candidate, dense))
            found[f"{phase} batch {batch}"] = ratio(*speeds)
    return {name: value for name, value in found.items() if value is not None}


def _beside(cells: Mapping[str, tuple[float | None, str]]) -> dict[str, str]:
    dense = cells["dense"][0]
    return {
        name: shown if name == "dense" or value is None else f"{shown} ({times(ratio(value, dense))})"
        for name, (value, shown) in cells.items()
    }


def _table(report: Report) -> str:
    models = list(report.models())
    rows = [[name, *(cells[model] for model in models)] for name, cells in figures(report).items()]
    return _markdown(["", *models], rows)


def _rules(report: Report) -> str:
    rows = [[rule.name, rule.told, "holds" if rule.passed else "**fails**", rule.why] for rule in report.verdict.rules]
    return _markdown(["rule", "found", "outcome", "why"], rows) if rows else ""


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _has_picture(report: Report) -> bool:
    return drawn_text(report.models()) is not None


def drawn_text(models: Mapping[str, Measured]) -> str | None:
    """Return the first text that the dense model has a perplexity on, which the picture shows; None if there is none."""
    texts = models["dense"].perplexity
    return next((text for text, value in texts.items() if ratio(value, 1.0)), None)
