"""Every method on one release, at one budget: without training, and with the same training behind it.

    python -m benchmarks.evidence --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --recipes seam shortgpt sleb --ratios 0.2 0.4 --seeds 0 1 2 --trained seam/0 shortgpt/0 --out evidence.json

For each recipe, ratio and seed it draws the seed's windows, lets the recipe's method choose, applies the recipe's transfer, and measures
the perplexity without any training (`transfer`). For each RECIPE/SEED of `--trained` it goes on:

    candidate       the transfer, then the training of the recipe `seam`, the same for all, with the parts closed from the first step
    control         the same parts cut first, no transfer, the same training

With `--tasks FOLDER` the dense model and the trained models of the first seed answer the tasks there (lm-eval's files) too.

A figure is written as soon as it is made, and made once: run it again to go on. `--table` prints the tables from what is there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import Bench, Figures, Losses, parser
from components.evaluate.zero_shot import zero_shot
from components.lib.errors import Refusal
from components.lib.recipe.loading import load_recipe
from components.lib.recipe.schema import Recipe
from components.lib.tasks.files import collect
from components.lib.tasks.load import load_tasks
from components.lib.training.journal import Silent
from components.lib.training.regularize import needs_teacher, regularize
from components.lib.transformer.gates import bypassed
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import NOTHING, Channels, Selection
from components.register.accuracy import judged_tasks, mean_accuracy
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

    def dense(self) -> dict[str, Any]:
        """Measure the dense model."""
        return self._measured(self.bench.model(), NOTHING, self.bench.arguments.seeds[0])

    def untrained(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        """Measure the recipe's transfer alone."""
        start = time.monotonic()
        model, selection = self.transferred(name, ratio, seed)
        return {"seconds": round(time.monotonic() - start), **self.bench.perplexities(model, selection)}

    def candidate(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        """Measure the transfer with the training behind it."""
        model, selection = self.transferred(name, ratio, seed)
        return self._trained(model, selection, ratio, seed, first=False)

    def control(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        """Measure the same parts cut first, without a transfer, and the same training."""
        selection = self.selection(name, ratio, seed)
        return self._trained(self.bench.cut(selection), selection, ratio, seed, first=True)

    def dense_trained(self, ratio: float, seed: int) -> dict[str, Any]:
        """Measure the dense model with the same training."""
        return self._trained(self.bench.model(), NOTHING, ratio, seed, first=False)

    def _trained(
        self, model: PreTrainedModel, selection: Selection, ratio: float, seed: int, first: bool
    ) -> dict[str, Any]:
        start = time.monotonic()
        settings = self.recipe(OURS, ratio).regularize.model_copy(
            update={"schedule": "anneal", "anneal": 0.0, "seed": seed}
        )
        teacher = self.bench.model() if needs_teacher(settings, first) else None
        windows: Tensor = self.bench.windows(seed)
        model = regularize(model, teacher, windows, selection, settings, already_cut=first, journal=Losses())
        seconds = round(time.monotonic() - start)
        return {"seconds": seconds, **self._measured(model, NOTHING if first else selection, seed)}

    def _measured(self, model: PreTrainedModel, without: Selection, seed: int) -> dict[str, Any]:
        """Return the perplexities, and the scores on the tasks if they are asked for and the seed is the first."""
        arguments = self.bench.arguments
        figure: dict[str, Any] = dict(self.bench.perplexities(model, without))
        if arguments.tasks and seed == arguments.seeds[0]:
            with (
                tempfile.TemporaryDirectory() as folder,
                bypassed(model, without.removed),
                narrowed(model, without.channels),
            ):
                tasks = load_tasks(folders=[collect(arguments.tasks, Path(folder))])
                figure["tasks"] = zero_shot(
                    tasks, model, self.bench.tokenizer, batch_size=16, limit=arguments.task_limit
                )
        return figure


def cells(evidence: Evidence) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the figures to make, with how and from what: the first seed of every recipe before the second of any."""
    arguments = evidence.bench.arguments
    yield "dense", evidence.dense, ()
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
    """Yield Markdown: a table for each ratio, with medians over the seeds that are there and, in brackets, least and greatest.

    A trained model stands beside its control: the ratio of the two, seed by seed, is the median, the least and the greatest.
    """
    arguments, held = bench.arguments, figures.figures
    names = judged_tasks(held["dense"].get("tasks", {}))

    def cell(values: Sequence[float], form: str) -> str:
        if not values:
            return ""
        middle = f"{statistics.median(values):{form}}"
        return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"

    def row(title: str, prefix: str, over: str = "") -> str | None:
        found = {seed: held[f"{prefix}/{seed}"] for seed in arguments.seeds if f"{prefix}/{seed}" in held}
        if not found:
            return None
        cells = [cell([figure[text] for figure in found.values()], ".1f") for text in bench.tests]
        means = [mean for one in found.values() if (mean := mean_accuracy(one.get("tasks", {}), names))]
        if names:
            cells.append(cell([100 * mean.value for mean in means], ".1f"))
        both = [(one, held[f"{over}/{seed}"]) for seed, one in found.items() if f"{over}/{seed}" in held]
        cells += [cell([one[text] / other[text] for one, other in both], ".3f") for text in bench.tests]
        return f"| {title} | " + " | ".join([*cells, str(len(found))]) + " |"

    heads = [*bench.tests, *(["tasks, mean accuracy, %"] if names else [])]
    heads += [f"{text}, over its control" for text in bench.tests]
    for ratio in arguments.ratios:
        yield f"\n| at {ratio:g} | " + " | ".join([*heads, "seeds"]) + " |"
        yield "|---|" + "---|" * (len(heads) + 1)
        dense = mean_accuracy(held["dense"].get("tasks", {}), names)
        cells = [f"{held['dense'][text]:.1f}" for text in bench.tests] + ([f"{100 * dense.value:.1f}"] if dense else [])
        yield "| dense | " + " | ".join(cells) + " |" * (len(bench.tests) + 2)
        rows = [row("dense, the same training", "dense-trained")]
        for name in arguments.recipes:
            control = f"control/{name}/{ratio}"
            rows += [
                row(f"`{name}`, no training", f"transfer/{name}/{ratio}"),
                row(f"`{name}`, trained", f"candidate/{name}/{ratio}", control),
                row(f"control of `{name}`: cut first, the same training", control),
            ]
        yield from (some for some in rows if some)


def main() -> None:
    """Parse the command, make the figures that are missing, and print the tables."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--recipes", nargs="+", default=[OURS, "shortgpt", "last", "random"])
    arguments.add_argument("--trained", nargs="*", default=[], metavar="RECIPE/SEED", help="which are trained")
    arguments.add_argument("--controls", nargs="*", default=[OURS], help="recipes whose trained cells have a control")
    arguments.add_argument("--dense-trained", nargs="*", type=int, default=[], metavar="SEED")
    arguments.add_argument("--tasks", type=Path, metavar="FOLDER", help="task files of lm-eval, for the first seed")
    arguments.add_argument("--task-limit", type=int, default=400, help="examples of each task")
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
