"""What does a choice cost, and what is left after the transfer? Seam with the transfer ridge against TRSP's gates.

    python -m benchmarks.choice --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --layers 6 12 --seeds 0 --samples 320 --test-windows 48 --out choice.json

All choices are made in one process on the same windows. A gates' run of the most layers holds those of fewer: its choices are nested.
`--measure fitted` measures the gates' shortlist behind the transfer. With `--gate-steps` below the recipe's, the time that the missing steps would take is added, by the median time of a step, and the
figure says so. Every method's choice is measured cut as it is, and after the transfer ridge. To reach: choice and transfer of Seam together in
0.15 of the time of the gates.

The file of figures is written after each figure; the same command goes on where it stopped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from benchmarks.common import Bench, Figures, parser
from components.lib.methods import LayerMethod, known_methods
from components.lib.methods.trsp import Trsp
from components.lib.training.journal import Silent
from components.lib.transfers import known_transfers
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.device import reused_memory
from components.lib.transformer.selection import NOTHING, Selection

SHARE = 0.15
"""The part of the gates' time in which Seam's choice and transfer are to be done."""


class Clock(Silent):
    """Notes when each step of the gates ends, in seconds and in processor seconds."""

    def __init__(self) -> None:
        self.start = _now()
        self.steps = list[tuple[float, float]]()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Note a step."""
        self.steps.append(self.elapsed())

    def elapsed(self) -> tuple[float, float]:
        """Return seconds and processor seconds since the start."""
        wall, processor = _now()
        return wall - self.start[0], processor - self.start[1]


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    clock = Clock()
    made = work()
    wall, processor = clock.elapsed()
    return made, {"seconds": round(wall, 1), "cpu_seconds": round(processor, 1)}


def choose(bench: Bench, method: str, count: int, seed: int) -> dict[str, Any]:
    """Return the layers that a method chooses, and the time it takes."""
    model, windows = bench.model(), bench.windows(seed)
    kind = known_methods()[method]
    own = {"seed": seed} if "seed" in kind.model_fields else {}
    made = kind.model_validate({"ratio": count / _layers(bench)} | own)
    with reused_memory(model.device):
        chosen, times = _timed(lambda: made.choose(model, windows, NOTHING, journal=Silent(), out=None))
    return {"removed": list(chosen.removed), **times}


def gates(
    bench: Bench, count: int, seed: int, steps: int | None, measure: Literal["cut", "fitted"]
) -> list[dict[str, Any]]:
    """Return the layers and the time of the gates for 1 … `count` layers, from one run."""
    model, windows = bench.model(), bench.windows(seed)
    default = Trsp(ratio=count / _layers(bench), seed=seed, measure=measure)
    settings = default.model_copy(update={"steps": steps or default.steps})
    with reused_memory(model.device):
        clock = Clock()
        chosen = settings.choose(model, windows, NOTHING, journal=clock, out=None)
        ends = [*clock.steps[settings.steps :: settings.steps], clock.elapsed()]
    rounds = []
    for number, end in enumerate(ends, 1):
        wall, processor = (
            # A round ends before the first step of the next.
            end[kind] - (number < count) * step + number * (default.steps - settings.steps) * step
            for kind, step in enumerate(_step(clock.steps, settings.steps))
        )
        times = {"seconds": round(wall, 1), "cpu_seconds": round(processor, 1)}
        rounds.append({"removed": sorted(chosen.order[:number]), **times, "steps_taken": settings.steps})
    return rounds


def _step(ends: Sequence[tuple[float, float]], steps: int) -> tuple[float, float]:
    """Return the median time of a step that follows another in its round."""
    inner = [number for number in range(1, len(ends)) if number % steps] or [0]
    wall, processor = (
        statistics.median(ends[number][kind] - (ends[number - 1][kind] if number else 0.0) for number in inner)
        for kind in (0, 1)
    )
    return wall, processor


def after_ridge(bench: Bench, layers: list[int], seed: int) -> dict[str, Any]:
    """Apply the transfer ridge for some layers; return its time, and the perplexities with it and of the plain cut."""
    model, windows = bench.model(), bench.windows(seed)
    selection = Selection.of_layers("", layers)
    cut = bench.perplexities(model, selection)
    ridge = known_transfers()["ridge"]()
    with reused_memory(model.device):
        _, times = _timed(lambda: ridge.apply(model, windows, selection, journal=Silent()))
    return {**times, "cut": cut, "ridge": bench.perplexities(model, selection)}


def _layers(bench: Bench) -> int:
    return PrunableCheckpoint.open(bench.arguments.model).layers


def run(bench: Bench, figures: Figures, seed: int) -> None:
    """Make every figure of a seed that is not there yet, the dearest last, and print what they say."""
    arguments = bench.arguments
    figures.get("dense", lambda: bench.perplexities(bench.model()))
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for method in ["seam", *arguments.methods]:
        for count in arguments.layers:
            rows[count, method] = figures.get(f"{method}/{count}/{seed}", choose, bench, method, count, seed)
    steps, most = arguments.gate_steps, max(arguments.layers)
    for measure in arguments.measure:
        name = "gates" if measure == "cut" else f"gates {measure}"
        learned = figures.get(f"{name}/{most}/{steps or 'all'}/{seed}", gates, bench, most, seed, steps, measure)
        rows |= {(count, name): learned[count - 1] for count in arguments.layers}
    for (count, method), row in sorted(rows.items()):
        made = figures.get(f"ridge {row['removed']}/{seed}", after_ridge, bench, row["removed"], seed)
        shown = {text: f"{made['cut'][text]:.2f} → {made['ridge'][text]:.2f}" for text in bench.tests}
        print(f"{count} layers, {method:12} {row['seconds']:8.1f} s  {row['removed']}  cut → ridge {shown}")
    for count in arguments.layers if (most, "gates") in rows else ():
        seam, other = rows[count, "seam"], rows[count, "gates"]
        moved = figures.figures[f"ridge {seam['removed']}/{seed}"]
        for kind in ("seconds", "cpu_seconds"):
            ratio = (seam[kind] + moved[kind]) / other[kind]
            print(f"{count} layers, {kind}: (seam + ridge) / gates = {ratio:.3f}, to reach {SHARE}", flush=True)


def main() -> None:
    """Parse the command, make the figures, write and print them."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--layers", type=int, nargs="+", required=True, help="how many layers are removed")
    others = [
        name for name, kind in known_methods().items() if issubclass(kind, LayerMethod) and name not in ("seam", "trsp")
    ]
    arguments.add_argument("--methods", nargs="*", choices=others, default=[], help="other methods to measure")
    arguments.add_argument("--gate-steps", type=int, help="steps a round of the gates, if fewer than the recipe's")
    measures = get_args(Trsp.model_fields["measure"].annotation)
    arguments.add_argument(
        "--measure", nargs="*", choices=measures, default=["cut"], help="how the gates' shortlist is measured"
    )
    bench = Bench(arguments.parse_args())
    figures = Figures(bench.arguments.out, bench.conditions())
    for seed in bench.arguments.seeds:
        run(bench, figures, seed)


if __name__ == "__main__":
    main()
