"""How good is the choice? The gates against SLEB and ShortGPT, by the perplexity of the cut without training.

    python -m benchmarks.selection --model MODEL --calibration TRAIN.txt --test wikitext2=TEST.txt --test technical=OTHER.txt \\
        --ratios 0.25 0.5 --seeds 0 1 2 --samples 128 --out selection.json

Every seed draws its own windows. To reach: the gates' choice within 5 % of SLEB's, on every seed, ratio and text.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.common import Bench, Figures, parser
from benchmarks.quality import choose
from components.lib.transformer.gates import bypassed

METHODS = ("trsp", "sleb", "shortgpt")


def chosen(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Return the layers in their order, and what the choice took."""
    start = time.process_time()
    return {"order": choose(bench, method, seed), "cpu_seconds": round(time.process_time() - start, 1)}


def cut(bench: Bench, layers: list[int]) -> dict[str, float]:
    """Return the perplexities of the dense model without the layers."""
    model = bench.model()
    with bypassed(model, layers):
        return bench.perplexities(model)


def main() -> None:
    """Parse the command, make the figures, write and print them."""
    bench = Bench(parser(__doc__.splitlines()[0]).parse_args())
    arguments = bench.arguments
    figures = Figures(arguments.out, bench.conditions())
    for seed in arguments.seeds:
        orders = {method: figures.get(f"{method}/{seed}", chosen, bench, method, seed)["order"] for method in METHODS}
        for ratio in arguments.ratios:
            values = {}
            for method, order in orders.items():
                layers = sorted(order[: bench.count(ratio)])
                values[method] = figures.get(f"layers {layers}", cut, bench, layers)
            for text in bench.tests:
                shown = {method: round(values[method][text], 2) for method in values}
                print(
                    f"{ratio:.0%} seed {seed} {text}: {shown}, trsp / sleb {shown['trsp'] / shown['sleb']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
