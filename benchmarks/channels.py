"""Channels: regularise first, or prune first? DReSS against its control, axis by axis, by perplexity.

    python -m benchmarks.channels --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --axes ffn heads hidden hidden+ffn --ratios 0.25 0.5 --seeds 0 1 2 --out channels.json

Every seed draws its own windows, chooses its own channels by the recipe's section `dress`, and trains what benchmarks.quality trains.
A ratio that an axis cannot have (TRSP's and DReSS's refusals say why) is told and left out.
"""

from __future__ import annotations

import statistics

from benchmarks.common import Bench, Figures, parser
from benchmarks.quality import VARIANTS, measure
from components.errors import Refusal
from components.learn_gates.methods import Task, load
from components.training.journal import Silent
from components.transformer.channels import check_channels
from components.transformer.checkpoint import Checkpoint
from components.transformer.selection import NOTHING, Selection


def choose(bench: Bench, axes: str, ratio: float, seed: int) -> Selection:
    """Let DReSS choose the channels of a seed."""
    recipe = bench.recipe(f"dress.axes=[{axes.replace('+', ',')}]", f"dress.seed={seed}", f"target.ratio={ratio}")
    check_channels(Checkpoint.open(bench.arguments.model), recipe.dress.ratios(ratio), recipe.dress.multiple)
    task = Task(recipe.target, dress=recipe.dress)
    return load("dress")(bench.model(), bench.windows(seed), task, journal=Silent(), out=None)


def run(bench: Bench, figures: Figures) -> None:
    """Make every figure that is not there yet, and print each comparison when it is whole."""
    arguments = bench.arguments
    figures.get("dense", measure, bench, "cut", NOTHING, 0)
    for ratio in arguments.ratios:
        for axes in arguments.axes:
            try:
                chosen = {seed: choose(bench, axes, ratio, seed) for seed in arguments.seeds}
            except Refusal as refusal:
                print(f"{axes} {ratio:.0%}: {refusal}", flush=True)
                continue
            for seed, selection in chosen.items():
                for variant in arguments.variants:
                    if variant != "dense-trained":
                        figures.get(f"{axes}/{ratio}/{variant}/{seed}", measure, bench, variant, selection, seed)
            _tell(bench, figures, f"{axes}/{ratio}")
    if "dense-trained" in arguments.variants:
        for seed in arguments.seeds:
            figures.get(f"dense-trained/{seed}", measure, bench, "dense-trained", NOTHING, seed)


def _tell(bench: Bench, figures: Figures, name: str) -> None:
    for variant in (variant for variant in bench.arguments.variants if variant != "dense-trained"):
        found = [figures.figures[f"{name}/{variant}/{seed}"] for seed in bench.arguments.seeds]
        told = []
        for text in bench.tests:
            values = [figure[text] for figure in found]
            told.append(f"{text} {statistics.median(values):8.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"{name:16} {variant:14} {'   '.join(told)}", flush=True)


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
