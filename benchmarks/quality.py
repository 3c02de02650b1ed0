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
from collections.abc import Sequence

from benchmarks.common import Bench, Figures, Losses, parser
from components.learn_gates.methods import load
from components.training.journal import Silent
from components.training.regularize import needs_teacher, regularize
from components.transformer.surgery import drop_layers

LM_ONLY = ("regularize.objective.lm=1", "regularize.objective.kl=0", "regularize.objective.state=0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "candidate": (),
    "control-same": (),
    "control-lm": LM_ONLY,
    "penalty": (*LM_ONLY, "regularize.schedule=penalty"),
    "dense-trained": (),
    "cut": (),
}


def measure(bench: Bench, variant: str, layers: Sequence[int], seed: int) -> dict[str, float]:
    """Train one variant and return its perplexities; `cut` is the cut without training."""
    settings = bench.recipe(*VARIANTS[variant], f"regularize.seed={seed}").regularize
    model = bench.model()
    if variant == "cut":
        return bench.perplexities(drop_layers(model, layers))
    first = variant.startswith("control")
    if first:
        model = drop_layers(model, layers)
    chosen = () if first or variant == "dense-trained" else layers
    teacher = bench.model() if needs_teacher(settings, chosen) else None
    model = regularize(model, teacher, bench.windows(seed), chosen, settings, journal=Losses())
    if chosen:
        model = drop_layers(model, layers)
    return bench.perplexities(model)


def choose(bench: Bench, method: str, seed: int) -> list[int]:
    """Let a method choose the layers of a seed, in order: those of a ratio come first among those of a larger one."""
    count = bench.count(max(bench.arguments.ratios))
    gates = bench.recipe(f"gates.seed={seed}").gates
    return list(load(method)(bench.model(), bench.windows(seed), count, gates, journal=Silent(), out=None).order)


def run(bench: Bench, figures: Figures) -> None:
    """Make every figure that is not there yet, the cheapest comparisons first."""
    arguments = bench.arguments
    figures.get("dense", measure, bench, "cut", (), 0)
    for seed in arguments.seeds:
        order = figures.get(f"order/{seed}", choose, bench, "trsp", seed)
        for ratio in arguments.ratios:
            layers = sorted(order[: bench.count(ratio)])
            for variant in arguments.variants:
                at = "" if variant == "dense-trained" else f"/{ratio}"
                figures.get(f"{variant}{at}/{seed}", measure, bench, variant, layers, seed)


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
