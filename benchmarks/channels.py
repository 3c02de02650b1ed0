"""Channels: regularise first, or prune first? DReSS against its control, axis by axis, by perplexity.

    python -m benchmarks.channels --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --axes ffn heads hidden hidden+ffn --ratios 0.25 0.5 --seeds 0 1 2 --out channels.json

Every seed draws its own windows, chooses its own channels by the recipe's method `dress`, and trains what benchmarks.quality trains.
Medians are over the seeds, and so are the ratios, each of which is of one seed's two trainings.
A ratio that an axis cannot have is told, with the reason, and left out.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

from benchmarks.common import Bench, Figures, parser
from benchmarks.quality import VARIANTS, measure
from components.lib.errors import Refusal
from components.lib.methods import Method
from components.lib.recipe.schema import Recipe
from components.lib.training.journal import Silent
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import NOTHING, Selection


def recipe(bench: Bench, axes: str, ratio: float, seed: int = 0) -> Recipe:
    """Return the recipe that narrows some axes, joined by +."""
    dress = "methods.dress"
    return bench.recipe(f"{dress}.axes=[{axes.replace('+', ',')}]", f"{dress}.seed={seed}", f"{dress}.ratio={ratio}")


def dress_of(recipe: Recipe) -> Method:
    """Return the recipe's method of channels."""
    return next(method for method in recipe.methods.chosen if method.removes == "channels")


def choose(bench: Bench, axes: str, ratio: float, seed: int) -> Selection:
    """Let DReSS choose the channels of a seed."""
    dress = dress_of(recipe(bench, axes, ratio, seed))
    return dress.choose(bench.model(), bench.windows(seed), NOTHING, journal=Silent(), out=None)


def run(bench: Bench, figures: Figures) -> None:
    """Make every figure that is not there yet, and print each comparison when it is whole."""
    arguments = bench.arguments
    figures.get("dense", measure, bench, "cut", NOTHING, 0)
    for ratio in arguments.ratios:
        for axes in arguments.axes:
            try:
                dress_of(recipe(bench, axes, ratio)).check(PrunableCheckpoint.open(arguments.model))
            except Refusal as refusal:
                print(f"{axes} {ratio:.0%}: {refusal}", flush=True)
                continue
            chosen = functools.cache(functools.partial(choose, bench, axes, ratio))
            for seed in arguments.seeds:
                for variant in arguments.variants:
                    if variant != "dense-trained":
                        figures.get(f"{axes}/{ratio}/{variant}/{seed}", _trained, bench, variant, chosen, seed)
            _tell(bench, figures, f"{axes}/{ratio}")
    if "dense-trained" in arguments.variants:
        for seed in arguments.seeds:
            figures.get(f"dense-trained/{seed}", measure, bench, "dense-trained", NOTHING, seed)


def _trained(bench: Bench, variant: str, chosen: Callable[[int], Selection], seed: int) -> dict[str, float]:
    return measure(bench, variant, chosen(seed), seed)


def _tell(bench: Bench, figures: Figures, name: str) -> None:
    """Print each variant's perplexities, and the candidate's over each control's."""
    variants = [variant for variant in bench.arguments.variants if variant != "dense-trained"]

    def values(variant: str, text: str) -> list[float]:
        return [figures.figures[f"{name}/{variant}/{seed}"][text] for seed in bench.arguments.seeds]

    def line(label: str, found: dict[str, list[float]], digits: int) -> None:
        told = (f"{text} {_spread(some, digits)}" for text, some in found.items())
        print(f"{name:16} {label:26} {'   '.join(told)}", flush=True)

    for variant in variants:
        line(variant, {text: values(variant, text) for text in bench.tests}, 2)
    for control in (variant for variant in variants if variant.startswith("control") and "candidate" in variants):
        over = {
            text: [ours / theirs for ours, theirs in zip(values("candidate", text), values(control, text), strict=True)]
            for text in bench.tests
        }
        line(f"candidate / {control}", over, 4)


def _spread(values: Sequence[float], digits: int) -> str:
    """Return the median, least and greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Parse the command, make the figures, write and print them."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument(
        "--axes", nargs="+", default=["ffn", "heads", "hidden", "hidden+ffn"], help="axes, joined by +"
    )
    arguments.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=["cut", "candidate", "control-same", "control-lm"]
    )
    bench = Bench(arguments.parse_args())
    figures = Figures(bench.arguments.out, bench.conditions())
    run(bench, figures)


if __name__ == "__main__":
    main()
