"""Every method on one release, at one budget: without training, and with the same training behind it.

    python -m benchmarks.evidence --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --recipes seam shortgpt sleb --ratios 0.2 0.4 --seeds 0 1 2 --trained seam/0 shortgpt/0 --out evidence.json

For each recipe, ratio and seed it draws the seed's windows, lets the recipe's method choose, applies the recipe's transfer, and measures
the perplexity without any training (`transfer`). For each RECIPE/SEED of `--trained` it goes on:

    candidate       the transfer, then the training of the recipe `seam`, the same for all, with the parts closed from the first step
    control         the same parts cut first, no transfer, the same training

A figure is written as soon as it is made, and made once: run it again to go on. `--table` prints the tables from what is there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import Bench, Figures, Losses, parser
from components.lib.errors import Refusal
from components.lib.recipe.loading import load_recipe
from components.lib.recipe.schema import Recipe
from components.lib.training.journal import Silent
from components.lib.training.regularize import needs_teacher, regularize
from components.lib.transformer.selection import NOTHING, Channels, Selection
from pipeline.recipes import find_recipe

OURS = "seam"


class Evidence:
    """The cells of the table: a recipe at a ratio with a seed."""

    def __init__(self, bench: Bench, figures: Figures) -> None:
        self.bench, self.figures = bench, figures

    def recipe(self, name: str, ratio: float) -> Recipe:
        """Return a shipped recipe with the ratio set on each of its methods, and the command's fields."""
        path = find_recipe(name)
        methods = [type(method).name for method in load_recipe(path).methods.chosen]
        ratios = [f"methods.{method}.ratio={ratio}" for method in methods]
        return load_recipe(path, [*ratios, *self._fields(methods)])

    def _fields(self, methods: Sequence[str]) -> Iterator[str]:
        for field in self.bench.arguments.set:
            if not field.startswith("methods.") or field.split(".")[1] in methods:
                yield field

    def selection(self, name: str, ratio: float, seed: int) -> Selection:
        """Return what the recipe's methods choose on the seed's windows."""
        chosen = self.figures.get(f"choice/{name}/{ratio}/{seed}", self._choose, name, ratio, seed)
        return Selection(
            method=name, removed=tuple(chosen["removed"]), channels=Channels.model_validate(chosen["channels"])
        )

    def _choose(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        start = time.monotonic()
        selection = NOTHING
        for method in self.recipe(name, ratio).methods.chosen:
            seeded = method.model_copy(update={"seed": seed}) if "seed" in type(method).model_fields else method
            windows = self.bench.windows(seed)[: self.bench.arguments.choosing]
            selection = seeded.choose(self.bench.model(), windows, selection, journal=Silent(), out=None)
        held = {"removed": list(selection.removed), "channels": selection.channels.model_dump(mode="json")}
        return held | {"seconds": round(time.monotonic() - start)}

    def transferred(self, name: str, ratio: float, seed: int) -> tuple[PreTrainedModel, Selection]:
        """Return the full-size model after the recipe's transfer, and its selection."""
        selection, model = self.selection(name, ratio, seed), self.bench.model()
        transfer = self.recipe(name, ratio).regularize.transfer.chosen
        if transfer:
            transfer.apply(model, self.bench.windows(seed), selection, journal=Silent())
        return model, selection

    def untrained(self, name: str, ratio: float, seed: int) -> dict[str, float]:
        """Measure the recipe's transfer alone."""
        start = time.monotonic()
        model, selection = self.transferred(name, ratio, seed)
        return {"seconds": round(time.monotonic() - start), **self.bench.perplexities(model, selection)}

    def candidate(self, name: str, ratio: float, seed: int) -> dict[str, float]:
        """Measure the transfer with the training behind it."""
        model, selection = self.transferred(name, ratio, seed)
        return self._trained(model, selection, ratio, seed, first=False)

    def control(self, name: str, ratio: float, seed: int) -> dict[str, float]:
        """Measure the same parts cut first, without a transfer, and the same training."""
        selection = self.selection(name, ratio, seed)
        return self._trained(self.bench.cut(selection), selection, ratio, seed, first=True)

    def dense_trained(self, ratio: float, seed: int) -> dict[str, float]:
        """Measure the dense model with the same training."""
        return self._trained(self.bench.model(), NOTHING, ratio, seed, first=False)

    def _trained(
        self, model: PreTrainedModel, selection: Selection, ratio: float, seed: int, first: bool
    ) -> dict[str, float]:
        start = time.monotonic()
        settings = self.recipe(OURS, ratio).regularize.model_copy(
            update={"schedule": "anneal", "anneal": 0.0, "seed": seed}
        )
        teacher = self.bench.model() if needs_teacher(settings, first) else None
        windows: Tensor = self.bench.windows(seed)
        model = regularize(model, teacher, windows, selection, settings, already_cut=first, journal=Losses())
        seconds = round(time.monotonic() - start)
        return {"seconds": seconds, **self.bench.perplexities(model, NOTHING if first else selection)}


def cells(evidence: Evidence) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the figures to make, with how and from what: the first seed of every recipe before the second of any."""
    arguments = evidence.bench.arguments
    yield "dense", evidence.bench.perplexities, (evidence.bench.model(),)
    for seed in arguments.seeds:
        for ratio in arguments.ratios:
            trained = [name for name in arguments.recipes if f"{name}/{seed}" in arguments.trained]
            for name in trained:
                yield f"candidate/{name}/{ratio}/{seed}", evidence.candidate, (name, ratio, seed)
                if name in arguments.controls:
                    yield f"control/{name}/{ratio}/{seed}", evidence.control, (name, ratio, seed)
        for ratio in arguments.ratios:
            for name in arguments.recipes:
                yield f"transfer/{name}/{ratio}/{seed}", evidence.untrained, (name, ratio, seed)
    for seed in arguments.dense_trained:
        yield f"dense-trained/{seed}", evidence.dense_trained, (arguments.ratios[0], seed)


def tables(bench: Bench, figures: Figures) -> Iterator[str]:
    """Yield Markdown: one table for each ratio, with the median over the seeds that are there and, in brackets, their number."""
    arguments, held = bench.arguments, figures.figures

    def row(title: str, prefix: str) -> str | None:
        found = [held[f"{prefix}/{seed}"] for seed in arguments.seeds if f"{prefix}/{seed}" in held]
        if not found:
            return None
        values = [statistics.median(figure[text] for figure in found) for text in bench.tests]
        return f"| {title} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {len(found)} |"

    for ratio in arguments.ratios:
        yield f"\n| at {ratio:g} | " + " | ".join(bench.tests) + " | seeds |"
        yield "|---|" + "---|" * (len(bench.tests) + 1)
        yield "| dense | " + " | ".join(f"{held['dense'][text]:.1f}" for text in bench.tests) + " | |"
        rows = [row("dense, the same training", "dense-trained")]
        for name in arguments.recipes:
            rows += [
                row(f"`{name}`, no training", f"transfer/{name}/{ratio}"),
                row(f"`{name}`, trained", f"candidate/{name}/{ratio}"),
                row(f"control of `{name}`: cut first, the same training", f"control/{name}/{ratio}"),
            ]
        yield from (some for some in rows if some)


def main() -> None:
    """Parse the command, make the figures that are missing, and print the tables."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--recipes", nargs="+", default=[OURS, "shortgpt", "last", "random"])
    arguments.add_argument("--trained", nargs="*", default=[], metavar="RECIPE/SEED", help="which are trained")
    arguments.add_argument("--controls", nargs="*", default=[OURS], help="recipes whose trained cells have a control")
    arguments.add_argument("--dense-trained", nargs="*", type=int, default=[], metavar="SEED")
    arguments.add_argument("--choosing", type=int, help="choose on the first windows only")
    arguments.add_argument("--table", action="store_true", help="print the tables of what is there, and make nothing")
    bench = Bench(arguments.parse_args())
    figures = Figures(Path(bench.arguments.out), bench.conditions())
    if not bench.arguments.table:
        for name, make, inputs in cells(Evidence(bench, figures)):
            try:
                figures.get(name, make, *inputs)
            except Refusal as refusal:
                print(f"{name}: {refusal}", flush=True)
    print("\n".join(tables(bench, figures)))


if __name__ == "__main__":
    main()
