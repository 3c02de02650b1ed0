"""The machine and the library versions that an evaluation ran with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from components.lib.transformer.device import best_device

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "lm_eval")


def machine() -> dict[str, Any]:
    """Return the device, processor, GPU, threads and library versions."""
    return {
        "device": best_device().type,
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the name of the processor; on Linux only /proc has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
