"""Where models run."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """The accelerator of this machine, or its processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
