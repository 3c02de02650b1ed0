"""Peak memory of cutting, loading and exporting, over the size of the checkpoint.

    python -m benchmarks.memory [--gigabytes 1.0] [--dtype bfloat16] [--folder /tmp/bench]

A random Llama of the given size is made on the spot. Each step runs in a process of its own, and its peak resident memory is
read from the kernel (VmHWM) less what the same process held after its imports. Files that are read by mapping them count
as resident while they are mapped, so the figure is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from components.lib.transformer.checkpoint import Checkpoint, load_model
from components.lib.transformer.export import save_model, verify_cut
from components.lib.transformer.surgery import cut_checkpoint, drop_layers

BOUND = 1.3
"""Peak memory over checkpoint size, at most."""

LAYERS = 12
REMOVED = (2, 5, 7)


def make(folder: Path, gigabytes: float, dtype: str) -> None:
    """Make a random Llama of about the given size, in shards of 300 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 1024
    vocabulary = 8192
    outside = 2 * vocabulary * width
    wanted = gigabytes * 1e9 / getattr(torch, dtype).itemsize
    # A block has 4 width² of attention and 3 width · intermediate of MLP.
    intermediate = int(((wanted - outside) / LAYERS - 4 * width**2) / (3 * width)) // 64 * 64 + 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        max_position_embeddings=512,
    )
    LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder, max_shard_size="300MB")


def cut(source: Path, out: Path) -> None:
    """Cut the checkpoint on disk."""
    cut_checkpoint(source, out, REMOVED)


def load(source: Path, out: Path) -> None:
    """Load the checkpoint: the least that any step with a model in memory needs."""
    load_model(source)


def export(source: Path, out: Path) -> None:
    """Load, cut in memory, and export."""
    save_model(drop_layers(load_model(source), REMOVED), source, out, removed=REMOVED)


def verify(source: Path, out: Path) -> None:
    """Cut on disk and verify: source and cut are loaded one after the other."""
    cut_checkpoint(source, out, REMOVED)
    verify_cut(source, out, REMOVED)


STEPS: dict[str, Callable[[Path, Path], None]] = {step.__name__: step for step in (cut, load, export, verify)}


def measure(step: str, source: Path, out: Path) -> dict[str, float]:
    """Run one step in this process, and return its seconds and the bytes its peak added."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    before = peak()
    start = time.perf_counter()
    STEPS[step](source, out)
    return {"seconds": time.perf_counter() - start, "bytes": peak() - before}


def peak() -> int:
    """The most memory this process has had resident, in bytes (Linux).

    Not ru_maxrss: a process inherits that from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def main() -> None:
    """Measure every step in a fresh process, and fail where one is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint that is made")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; a temporary folder when absent")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure(arguments.step, arguments.folder / "source", arguments.folder / arguments.step)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sys.exit(_report(Path(folder), arguments.gigabytes, arguments.dtype))


def _report(folder: Path, gigabytes: float, dtype: str) -> int:
    """Print a table, and return the exit status."""
    make(folder / "source", gigabytes, dtype)
    size = Checkpoint.open(folder / "source").bytes
    print(f"checkpoint: {size / 1e9:.2f} GB, {dtype}, {LAYERS} layers of which {len(REMOVED)} go\n")
    print("| step | peak over checkpoint size | seconds |\n|---|---|---|")
    worst = 0.0
    for step in STEPS:
        command = [sys.executable, "-m", "benchmarks.memory", "--folder", str(folder), "--step", step]
        told = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        found = json.loads(told.splitlines()[-1])
        worst = max(worst, found["bytes"] / size)
        print(f"| {step} | {found['bytes'] / size:.2f} | {found['seconds']:.1f} |", flush=True)
    print(f"\nthe worst is {worst:.2f}, and the bound {BOUND}")
    return int(worst > BOUND)


if __name__ == "__main__":
    main()
