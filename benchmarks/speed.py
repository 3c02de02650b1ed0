"""Does the candidate run as fast as the removed compute promises?

    python -m benchmarks.speed DENSE CANDIDATE --batches 1 8 64 --prompt 512 --repeats 20
    ESPALIER_VLLM_PYTHON=vllm/bin/python python -m benchmarks.speed DENSE CANDIDATE --backend vllm --batches 1 8

DENSE and CANDIDATE are checkpoint folders. Both are timed in turns: by transformers in one process, or behind vLLM's server, where a
batch is a number of concurrent requests. The speed-ups stand beside the one that the matrix products and attention of the prefill
promise (embedding and head counted as they are computed). Exit status 1 if the prefill of a batch reaches less than `--at-least` of
its promise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from components.evaluate.context import machine
from components.evaluate.served import measure_served
from components.evaluate.speed import SpeedOf, measure_speed, promised_speedup
from components.lib.recipe.schema import Speed
from components.lib.transformer.checkpoint import Checkpoint, load_model
from components.lib.transformer.device import best_device
from components.register.measured import Throughput

NAMES = ("dense", "candidate")


def main() -> int:
    """Measure, print a table, and return the exit status."""
    arguments = _arguments()
    folders = {name: getattr(arguments, name) for name in NAMES}
    speed = Speed(
        backend=arguments.backend,
        batches=tuple(arguments.batches),
        prompt=arguments.prompt,
        generate=arguments.generate,
        repeats=arguments.repeats,
    )
    # Before the models are loaded here, the servers have the memory for themselves.
    served = (
        measure_served({name: Checkpoint.open(one) for name, one in folders.items()}, speed)
        if speed.backend == "vllm"
        else None
    )
    models = {name: load_model(one, device=best_device()) for name, one in folders.items()}
    tokens = torch.randint(
        0, models["dense"].config.get_text_config().vocab_size, (2**16,), generator=torch.Generator().manual_seed(0)
    )
    found = served or measure_speed(models, speed, tokens)
    promised = promised_speedup(models["dense"], models["candidate"], speed.prompt)

    where = machine()
    print(f"{where['gpu'] or where['cpu']}, {where['threads']} threads, {models['dense'].dtype}, prompt {speed.prompt}")
    print(f"prefill speed-up promised by the removed compute: {promised:.3f}\n")
    print(f"{'':>10}{'batch':>6}{'dense':>10}{'candidate':>10} tok/s{'dense':>10}{'candidate':>10} ms   speed-up")
    reached = []
    for phase in found["dense"]:
        for batch in map(str, speed.batches):
            speedup = _row(phase, batch, found)
            if phase == "prefill":
                reached.append(speedup / promised)
    print("\nprefill speed-up over the promised one: " + ", ".join(f"{part:.3f}" for part in reached))
    return 0 if min(reached) >= arguments.at_least else 1


def _row(phase: str, batch: str, found: dict[str, SpeedOf]) -> float:
    """Print a line of the table: throughput, median latency, speed-up and its range over the turns. Return the speed-up (0 if there is none)."""
    dense, candidate = (Throughput.model_validate(found[name][phase][batch]) for name in NAMES)
    spread = candidate.spread(dense)
    if not dense.tokens_per_second or not candidate.tokens_per_second or not spread:
        print(
            f"{phase:>10}{batch:>6}  {found['dense'][phase][batch].get('reason') or found['candidate'][phase][batch]['reason']}"
        )
        return 0.0
    speedup = candidate.tokens_per_second / dense.tokens_per_second
    print(
        f"{phase:>10}{batch:>6}{dense.tokens_per_second:>10.1f}{candidate.tokens_per_second:>10.1f}      "
        f"{dense.latency_ms_p50:>10.1f}{candidate.latency_ms_p50:>10.1f}   {speedup:>8.3f} ({spread[0]:.2f} to {spread[1]:.2f})"
    )
    return speedup


def _arguments() -> argparse.Namespace:
    defaults = Speed()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--backend", choices=["transformers", "vllm"], default=defaults.backend)
    parser.add_argument("--batches", type=int, nargs="+", default=defaults.batches)
    parser.add_argument("--prompt", type=int, default=defaults.prompt, help="tokens of the prompt")
    parser.add_argument("--generate", type=int, default=defaults.generate, help="tokens decoded after it")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--at-least", type=float, default=0.95, help="the part of the promise to reach in prefill")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
