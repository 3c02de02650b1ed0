"""Throughput and latency of every model that was timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from components.register.format import ABSENT, number, times
from components.register.measured import Measured, Throughput, names, ratio
from components.register.report import Curves, Report
from components.register.sections.section import Cell, ReportSection


@dataclass(frozen=True)
class Phase:
    """The table of one phase."""

    name: str
    batches: list[str]
    rows: list[tuple[str, list[Cell]]]
    """A model's name, and a cell for each batch size."""


def speed(report: Report, curves: Curves) -> ReportSection:
    """Compare the models phase by phase."""
    dense, candidate = report.dense, report.candidate
    promised = times(ratio(dense.prefill_flops, candidate.prefill_flops), 2) if candidate.prefill_flops else ""
    served = report.parsed_recipe().evaluate.speed.backend == "vllm"
    data = {"phases": _phases(report.models()), "promised": promised, "served": served}
    return ReportSection("Speed", "speed.html.j2", data)


def _phases(models: Mapping[str, Measured]) -> list[Phase]:
    tables = []
    for phase in names(model.speed for model in models.values()):
        batches = names(model.speed.get(phase, {}) for model in models.values())
        rows = [
            (name, [_pace(model, models["dense"], phase, batch) for batch in batches])
            for name, model in models.items()
            if model.speed.get(phase)
        ]
        tables.append(Phase(phase, batches, rows))
    return tables


def _pace(model: Measured, dense: Measured, phase: str, batch: str) -> Cell:
    found = model.speed[phase].get(batch)
    if found is None:
        return Cell(ABSENT)
    base = dense.speed.get(phase, {}).get(batch, Throughput())
    speedup = times(ratio(found.tokens_per_second, base.tokens_per_second), 2)
    if model is not dense and (spread := found.spread(base)):
        speedup += f" ({spread[0]:.2f} to {spread[1]:.2f})"
    latency = f"{number(found.latency_ms_p50)} / {number(found.latency_ms_p90)} ms"
    return Cell(number(found.tokens_per_second), speedup, latency)
