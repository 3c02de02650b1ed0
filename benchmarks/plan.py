"""Hold the planned memory against what is really allocated, and plan well-known shapes.

    python -m benchmarks.plan hold      # five small shapes, trained for real on the processor: planned, allocated and resident bytes
    python -m benchmarks.plan table     # LLaMA-2-7B, LLaMA-3-8B, OPT-13B and Qwen3-32B on 1, 2 and 8 devices of 80 GB

The allocated bytes are the largest sum of the allocator's events, which torch's profiler records: what `torch.cuda.max_memory_allocated` is
on a GPU. The resident bytes are the process's, less those before the models were made; in them are the kernels' workspaces, and the pages
that freed tensors leave behind. Each figure is of a process of its own. On 2 and 8 devices the weights, gradients, optimizer and teacher
are divided as FSDP divides them, the batch among the processes, and two whole blocks are added, which FSDP gathers: this is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import peak
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.recipe.training import Regularize
from components.lib.training import regularize as training
from components.lib.transformer.selection import Selection
from pipeline.plan.fake import counted
from pipeline.plan.stages import Shape, needs

LENGTH, BATCH, REMOVED = 128, 4, (1, 2)

_WIDE = {"hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8, "max_position_embeddings": 512}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama, all weights": ({"model_type": "llama", "vocab_size": 16000, "intermediate_size": 1728, **_WIDE}, {}),
    "Llama, gradient checkpointing": (
        {"model_type": "llama", "vocab_size": 8000, "intermediate_size": 3456, **_WIDE},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
    ),
    "Qwen3, adapters": (
        {
            "model_type": "qwen3",
            "vocab_size": 32000,
            "intermediate_size": 1728,
            "num_key_value_heads": 2,
            "head_dim": 64,
            **_WIDE,
        },
        {"trainable": "lora"},
    ),
    "OPT, bf16": (
        {"model_type": "opt", "vocab_size": 16000, "ffn_dim": 2048, "word_embed_proj_dim": 512, **_WIDE},
        {"precision": "bf16"},
    ),
    "Gemma 2, fp32 without a teacher": (
        {
            "model_type": "gemma2",
            "vocab_size": 24000,
            "intermediate_size": 1728,
            "num_key_value_heads": 2,
            "head_dim": 64,
            **_WIDE,
        },
        {"precision": "fp32", "objective": {"lm": 1.0, "kl": 0.0, "state": 0.0}},
    ),
}
"""The config and the settings of `regularize` of each shape."""

_CURED = {"micro_batch_size": 1, "gradient_checkpointing": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "micro batch 1, gradient checkpointing": _CURED,
    "and bf16, adamw-8bit": _CURED | {"precision": "bf16", "optimizer": "adamw-8bit"},
    "micro batch 1, gradient checkpointing, adapters": _CURED | {"trainable": "lora"},
}
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-2-7B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
    "LLaMA-3-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "OPT-13B": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 5120,
        "ffn_dim": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 5120,
    },
    "Qwen3-32B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
}
"""The shapes as their releases' config.json states them."""

DEVICE = 80
"""GB of a device."""


def work(config: Mapping[str, Any], settings: Mapping[str, Any], memory: Any) -> None:
    """Train a random model of the config for two steps; inside `counted` nothing is computed."""
    shape, chosen = (
        Shape(config, "bfloat16"),
        Regularize.model_validate({"steps": 2, "batch_size": BATCH, "learning_rate": 1e-5, **settings}),
    )
    memory.model = shape.model()
    memory.teacher = shape.model() if training.needs_teacher(chosen) else None
    windows = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    training.regularize(memory.model, memory.teacher, windows, Selection.of_layers("plan", REMOVED), chosen)


def measure(case: str, kind: str) -> int:
    """Return the bytes of a case in this process."""
    torch.set_num_threads(1)
    config, settings = CASES[case]
    if kind == "planned":
        with counted("cpu") as memory:
            work(config, settings, memory)
        return memory.peak.total
    from pipeline.plan.fake import Memory

    if kind == "resident":
        with counted("cpu") as memory:  # loads every library
            work(config, settings, memory)
        before = peak()
        work(config, settings, Memory())
        return peak() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work(config, settings, Memory())
    events = [one for one in recorded.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def hold() -> int:
    """Print the table of the cases; return 1 if a plan is more than 10 % off the allocated bytes."""
    print("| shape | planned, MB | allocated, MB | planned / allocated | resident, MB |\n|---|---|---|---|---|")
    worst = 0.0
    for case in CASES:
        found = {}
        for kind in ("planned", "allocated", "resident"):
            command = [sys.executable, "-m", "benchmarks.plan", "measure", "--case", case, "--kind", kind]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[kind] = json.loads(told.splitlines()[-1])
        ratio = found["planned"] / found["allocated"]
        worst = max(worst, abs(ratio - 1))
        print(
            f"| {case} | {found['planned'] / 1e6:.0f} | {found['allocated'] / 1e6:.0f} | {ratio:.3f} | {found['resident'] / 1e6:.0f} |",
            flush=True,
        )
    print(f"\nthe plan is off by {100 * worst:.1f} % at most")
    return int(worst > 0.1)


def table(releases: Sequence[str]) -> None:
    """Print the GB of each device in the largest stages."""
    print(
        f"| release | settings of regularize | regularize on 1, 2, 8 × {DEVICE} GB | learn gates | evaluate |\n|---|---|---|---|---|"
    )
    for name, config in ((name, MODELS[name]) for name in releases):
        for said, settings in SETTINGS.items():
            recipe = _recipe(settings)
            shape = Shape(config, "bfloat16")
            found = {
                one.stage: one for one in needs(recipe, shape, "cuda", only=("learn-gates", "regularize", "evaluate"))
            }
            trained = found["regularize"]
            several = [trained.peak.total, *(trained.divided(devices) for devices in (2, 8) if trained.trained)]
            others = (found[stage].peak.total for stage in ("learn-gates", "evaluate"))
            print(
                f"| {name} | {said} | {', '.join(map(_told, several))} | {' | '.join(map(_told, others))} |", flush=True
            )


def _told(size: int) -> str:
    told = f"{size / 1e9:.0f}"
    return told if size <= DEVICE * 1e9 else f"**{told}**"


def _recipe(settings: Mapping[str, Any]) -> Recipe:
    small = settings.get("micro_batch_size")
    methods = "{trsp: {ratio: 0.25, batch_size: 1}}" if small else "{trsp: {ratio: 0.25}}"
    evaluate = f"{{perplexity: {{unused: unused.txt}}, batch_size: {1 if small else 8}}}"
    base = f"{{methods: {methods}, calibration: {{data: unused.txt}}, evaluate: {evaluate}}}"
    return parse_recipe(base, [f"regularize.{name}={value}" for name, value in settings.items()])


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["hold", "table", "measure"])
    parser.add_argument("--release", choices=MODELS, action="append", help="plan this one alone; may be repeated")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["planned", "allocated", "resident"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        print(measure(arguments.case, arguments.kind))
    elif arguments.command == "hold":
        sys.exit(hold())
    else:
        table(arguments.release or list(MODELS))


if __name__ == "__main__":
    main()
