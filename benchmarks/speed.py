"""Does the candidate run as fast as the removed compute promises?

    python benchmarks/speed.py DENSE CANDIDATE --batches 1 8 64 --prompt 512 --repeats 20

DENSE and CANDIDATE are checkpoint folders. Both are timed in turns in one process; the prefill speed-up that was achieved
stands beside the one that their matrix products and attention promise (embedding and head counted as they are computed).
Exit status 1 where a batch reaches less than `--at-least` of its promise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from components.evaluate.context import machine
from components.evaluate.speed import SpeedOf, measure_speed, promised_speedup
from components.lib.recipe.schema import Speed
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.device import best_device


def main() -> int:
    """Measure, print a table, and return the exit status."""
    arguments = _arguments()
    models = {name: load_model(getattr(arguments, name), device=best_device()) for name in ("dense", "candidate")}
    speed = Speed(
        batches=tuple(arguments.batches),
        prompt=arguments.prompt,
        generate=arguments.generate,
        repeats=arguments.repeats,
    )
    tokens = torch.randint(
        0, models["dense"].config.get_text_config().vocab_size, (2**16,), generator=torch.Generator().manual_seed(0)
    )
    found = measure_speed(models, speed, tokens)
    promised = promised_speedup(models["dense"], models["candidate"], speed.prompt)

    where = machine()
    print(f"{where['gpu'] or where['cpu']}, {where['threads']} threads, {models['dense'].dtype}, prompt {speed.prompt}")
    print(f"prefill speed-up promised by the removed compute: {promised:.3f}\n")
    print(f"{'':>8}{'batch':>6}{'dense':>12}{'candidate':>12}{'speed-up':>10}")
    reached = [_row("prefill", str(batch), found) / promised for batch in speed.batches]
    for batch in speed.batches:
        _row("decode", str(batch), found)
    print("\nprefill speed-up over the promised one: " + ", ".join(f"{part:.3f}" for part in reached))
    return 0 if min(reached) >= arguments.at_least else 1


def _row(phase: str, batch: str, found: dict[str, SpeedOf]) -> float:
    """Print a line of the table, in tokens per second, and return the speed-up (0 where a model was not measured)."""
    dense, candidate = (found[name][phase][batch] for name in ("dense", "candidate"))
    rates = dense["tokens_per_second"], candidate["tokens_per_second"]
    if not isinstance(rates[0], float) or not isinstance(rates[1], float):
        print(f"{phase:>8}{batch:>6}  {dense.get('reason') or candidate.get('reason')}")
        return 0.0
    print(f"{phase:>8}{batch:>6}{rates[0]:>12.0f}{rates[1]:>12.0f}{rates[1] / rates[0]:>10.3f}")
    return rates[1] / rates[0]


def _arguments() -> argparse.Namespace:
    defaults = Speed()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=defaults.batches)
    parser.add_argument("--prompt", type=int, default=defaults.prompt, help="tokens of the prompt")
    parser.add_argument("--generate", type=int, default=defaults.generate, help="tokens decoded after it")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--at-least", type=float, default=0.95, help="the part of the promise to reach in prefill")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
