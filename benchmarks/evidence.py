"""Every method on one release, at one budget: without training, and with the same training behind it.

    python -m benchmarks.evidence --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --recipes seam shortgpt sleb --ratios 0.2 0.4 --seeds 0 1 2 --trained seam/0 shortgpt/0 --out evidence.json

For each recipe, ratio and seed it draws the seed's windows, lets the recipe's method choose, applies the recipe's transfer, and measures
the perplexity without any training (`transfer`). For each RECIPE/SEED of `--trained` it goes on:

    candidate       the transfer, then the training of the recipe `seam`, the same for all, with the parts closed from the first step
    control         the same parts cut first, no transfer, the same training

With `--tasks FOLDER` the dense model and the trained models of the first seed at the last ratio answer the tasks there (lm-eval's files) too.

A figure is written as soon as it is made, and made once: run it again to go on. `python -m benchmarks.evidence_page` makes docs/evidence.md
of the files in benchmarks/figures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
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
from pipeline.recipes import find_recipe

OURS = "seam"


class Evidence:
    """The cells of the table: a recipe at a ratio with a seed."""

    def __init__(self, bench: Bench, figures: Figures) -> None:
        self.bench, self.figures = bench, figures

    @classmethod
    def open(cls, arguments: argparse.Namespace) -> Evidence:
        """Open the inputs, and the file of figures with what the page says about them."""
        bench = Bench(arguments)
        training = load_recipe(find_recipe(OURS), list(arguments.set)).regularize
        said = {
            "title": arguments.title,
            "calibration": arguments.calibration.name,
            "steps": f"{training.steps} steps of {training.batch_size} windows",
            "command": shlex.join(["python", "-m", "benchmarks.evidence", *map(_without_folder, sys.argv[1:])]),
        }
        return cls(bench, Figures(Path(arguments.out), bench.conditions() | said))

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

    def _transferred(self, name: str, ratio: float, seed: int) -> tuple[PreTrainedModel, Selection, dict[str, Any]]:
        """Return the full-size model after the recipe's transfer, its selection, and what the transfer alone gives."""
        start = time.monotonic()
        selection, model = self.selection(name, ratio, seed), self.bench.model()
        transfer = self.recipe(name, ratio).regularize.transfer.chosen
        if transfer:
            transfer.apply(model, self.bench.windows(seed), selection, journal=Silent())
        seconds = round(time.monotonic() - start)
        return model, selection, {"seconds": seconds, **self.bench.perplexities(model, selection)}

    def dense(self) -> dict[str, Any]:
        """Measure the dense model."""
        return self._measured(self.bench.model(), NOTHING, tasks=True)

    def untrained(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        """Measure the recipe's transfer alone."""
        return self._transferred(name, ratio, seed)[2]

    def candidate(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        """Measure the transfer with the training behind it, and the transfer alone on the way."""
        model, selection, alone = self._transferred(name, ratio, seed)
        self.figures.get(f"transfer/{name}/{ratio}/{seed}", lambda: alone)
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
        arguments = self.bench.arguments
        tasks = (ratio, seed) == (arguments.ratios[-1], arguments.seeds[0])
        return {"seconds": seconds, **self._measured(model, NOTHING if first else selection, tasks)}

    def _measured(self, model: PreTrainedModel, without: Selection, tasks: bool) -> dict[str, Any]:
        """Return the perplexities, and the scores on the tasks if the command names any."""
        arguments = self.bench.arguments
        figure: dict[str, Any] = dict(self.bench.perplexities(model, without))
        if arguments.tasks and tasks:
            with (
                tempfile.TemporaryDirectory() as folder,
                bypassed(model, without.removed),
                narrowed(model, without.channels),
            ):
                loaded = load_tasks(folders=[collect(arguments.tasks, Path(folder))])
                figure["tasks"] = zero_shot(
                    loaded, model, self.bench.tokenizer, batch_size=16, limit=arguments.task_limit
                )
        return figure


def _without_folder(argument: str) -> str:
    """Return an argument of the command with a file's name in place of its path."""
    name, equals, path = argument.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if "/" in path else argument


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


def main() -> None:
    """Parse the command, and make the figures that are missing."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--recipes", nargs="+", default=[OURS, "shortgpt", "last", "random"])
    arguments.add_argument("--trained", nargs="*", default=[], metavar="RECIPE/SEED", help="which are trained")
    arguments.add_argument("--controls", nargs="*", default=[OURS], help="recipes whose trained cells have a control")
    arguments.add_argument("--dense-trained", nargs="*", type=int, default=[], metavar="SEED")
    arguments.add_argument("--tasks", type=Path, metavar="FOLDER", help="task files of lm-eval")
    arguments.add_argument("--task-limit", type=int, default=400, help="examples of each task")
    arguments.add_argument("--choosing", type=int, help="choose on the first windows only")
    arguments.add_argument(
        "--title", default="Every method on one release", help="the section's title in docs/evidence.md"
    )
    evidence = Evidence.open(arguments.parse_args())
    for name, make, inputs in cells(evidence):
        try:
            evidence.figures.get(name, make, *inputs)
        except Refusal as refusal:
            print(f"{name}: {refusal}", flush=True)


if __name__ == "__main__":
    main()
