"""Regularise first, or prune first? The candidate against its controls, by perplexity.

    python -m benchmarks.quality --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --ratios 0.25 0.5 --seeds 0 1 2 --out quality.json

Every seed draws its own windows, chooses its own layers by the recipe's gates, and trains each of

    candidate       the recipe's default: regularised, then cut
    control-same    the same layers cut first, then the same training with the same objective
    control-lm      the same layers cut first, then the same training on the LM loss alone
    penalty         the paper's: LM loss and the penalty on the chosen layers, then cut
    dense-trained   the dense model with the default's training

with the same tokens, steps and trainable parameters. Ratios are of medians over the seeds.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common import Bench, Figures, Losses, parser
from components.lib.methods import known_methods
from components.lib.training.journal import Silent
from components.lib.training.regularize import needs_teacher, regularize
from components.lib.transformer.selection import NOTHING, Selection

LM_ONLY = ("regularize.objective.lm=1", "regularize.objective.kl=0", "regularize.objective.state=0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "candidate": (),
    "control-same": (),
    "control-lm": LM_ONLY,
    "penalty": (*LM_ONLY, "regularize.schedule=penalty"),
    "dense-trained": (),
    "cut": (),
}


def measure(bench: Bench, variant: str, selection: Selection, seed: int) -> dict[str, float]:
    """Train one variant and return its perplexities; `cut` is the cut without training."""
    settings = bench.recipe(*VARIANTS[variant], f"regularize.seed={seed}").regularize
    if variant == "cut":
        return bench.perplexities(bench.model(), selection)
    first = variant.startswith("control")
    model = bench.cut(selection) if first else bench.model()
    chosen = NOTHING if variant == "dense-trained" else selection
    teacher = bench.model() if needs_teacher(settings, first) else None
    windows = bench.windows(seed)
    model = regularize(model, teacher, windows, chosen, settings, already_cut=first, journal=Losses())
    return bench.perplexities(model, NOTHING if first else chosen)


def choose(bench: Bench, method: str, seed: int) -> list[int]:
    """Let a method choose the layers of a seed, in order: those of a ratio come first among those of a larger one."""
    settings: dict[str, Any] = {"ratio": max(bench.arguments.ratios)}
    if method == "trsp":
        settings = bench.recipe().methods.model_dump()["trsp"] | settings | {"seed": seed}
    chosen = known_methods()[method].model_validate(settings)
    return list(chosen.choose(bench.model(), bench.windows(seed), NOTHING, journal=Silent(), out=None).order)


def run(bench: Bench, figures: Figures) -> None:
    """Make every figure that is not there yet, the cheapest comparisons first."""
    arguments = bench.arguments
    figures.get("dense", measure, bench, "cut", NOTHING, 0)
    for seed in arguments.seeds:
        order = figures.get(f"order/{seed}", choose, bench, "trsp", seed)
        for ratio in arguments.ratios:
            layers = tuple(order[: bench.count(ratio)])
            selection = Selection.of_layers("trsp", layers)
            for variant in arguments.variants:
                at = "" if variant == "dense-trained" else f"/{ratio}"
                figures.get(f"{variant}{at}/{seed}", measure, bench, variant, selection, seed)


def summary(bench: Bench, figures: Figures) -> dict[str, dict[str, dict[str, float]]]:
    """Return, for each ratio and variant, the median over the seeds on each text."""
    arguments = bench.arguments

    def median(name: str, text: str) -> float:
        return statistics.median(figures.figures[f"{name}/{seed}"][text] for seed in arguments.seeds)

    def medians(name: str) -> dict[str, float]:
        return {text: median(name, text) for text in bench.tests}

    return {
        str(ratio): {
            variant: medians(variant if variant == "dense-trained" else f"{variant}/{ratio}")
            for variant in arguments.variants
        }
        | {"dense": figures.figures["dense"]}
        for ratio in arguments.ratios
    }


def main() -> None:
    """Parse the command, make the figures, write and print them."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    bench = Bench(arguments.parse_args())
    figures = Figures(bench.arguments.out, bench.conditions())
    run(bench, figures)
    medians = summary(bench, figures)
    figures.write(medians=medians)
    for ratio, variants in medians.items():
        print(f"\n{float(ratio):.0%} of the layers, median of {len(bench.arguments.seeds)} seeds")
        for name, values in variants.items():
            print(f"  {name:14}" + "".join(f"{text} {value:8.2f}   " for text, value in values.items()))


if __name__ == "__main__":
    main()
