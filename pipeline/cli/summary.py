"""The summary of a run on the terminal: every measured model side by side, the verdict, the controls, and the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components.lib.transformer.removal import NOUNS
from components.register.accuracy import accuracy, mean_accuracy
from components.register.format import ABSENT, count, number, percent, times
from components.register.headline import control_sentences, verdict_sentence
from components.register.measured import Measured, differing, ratio
from components.register.report import Report
from components.register.searched import target_sentence


def print_summary(report: Report | Mapping[str, Any], console: Console) -> None:
    """Print the table; the verdict, with each broken rule; whether the candidate beat the controls; and the prompts' continuations."""
    report = report if isinstance(report, Report) else Report.model_validate(report)
    console.print(summary_table(report))
    verdict = report.verdict
    word, style = ("Pass", "bold green") if verdict.passed else ("Fail", "bold red")
    console.print(f"[{style}]{word}[/]: {escape(verdict_sentence(report))}", highlight=False)
    for rule in verdict.failed:
        console.print(f"  {escape(rule.name)}: {escape(rule.told)}", highlight=False)
    for sentence in filter(None, [target_sentence(report), *control_sentences(report)]):
        console.print(escape(sentence), highlight=False)
    for prompt in report.candidate.continued:
        console.print(f"[bold]{escape(prompt)}[/]", highlight=False)
        for name, model in {"dense": report.dense, "candidate": report.candidate}.items():
            told = " ".join(model.continued.get(prompt, ABSENT).split())
            console.print(f"  {name}: {escape(told)}", highlight=False)


def summary_table(report: Report) -> Table:
    """Return the models as columns, the dense one first; beside each number its ratio to the dense model's."""
    models = dict(sorted(report.models().items(), key=lambda item: item[0] == "champion"))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right", style="bold" if name == "candidate" else "")
    for label, cells in _rows(models, report.judged_tasks()):
        table.add_row(escape(label), *cells)
    return table


def _rows(models: Mapping[str, Measured], tasks: list[str]) -> Iterator[tuple[str, list[str]]]:
    each = models.values()
    for axis in differing(each):
        counts = [model.along(axis) for model in each]
        yield NOUNS[axis], [ABSENT if count is None else f"{count:,}" for count in counts]
    yield "parameters", _beside([float(model.parameters) for model in each], count)
    for text in dict.fromkeys(text for model in each for text in model.perplexity):
        yield f"perplexity {text}", _beside([model.perplexity.get(text) for model in each], number)
    yield from _accuracies(models, tasks)
    for phase in dict.fromkeys(phase for model in each for phase in model.speed):
        for batch in dict.fromkeys(batch for model in each for batch in model.speed.get(phase, {})):
            speeds = [model.tokens_per_second(phase, batch) for model in each]
            yield f"{phase} tok/s, batch {batch}", _beside(speeds, number, digits=2)


def _accuracies(models: Mapping[str, Measured], tasks: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the accuracy on each task, and the mean over tasks if there are several."""
    found = {f"accuracy {task}": [accuracy(model.tasks.get(task)) for model in models.values()] for task in tasks}
    if len(tasks) > 1:
        found[f"accuracy, mean of {len(tasks)} tasks"] = [
            mean_accuracy(model.tasks, tasks) for model in models.values()
        ]
    for label, each in found.items():
        yield label, _beside([one.value if one else None for one in each], percent)


def _beside(values: list[float | None], shown: Callable[[float], str], digits: int = 3) -> list[str]:
    """Format each number with its ratio to the first, the dense model's."""
    return [
        shown(value) + (f" [dim]{times(ratio(value, values[0]), digits)}[/]" if index else "")
        if value is not None
        else ABSENT
        for index, value in enumerate(values)
    ]
