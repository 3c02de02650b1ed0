"""The plan of a run, its devices, and the refusal of a run that does not fit them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal
from components.lib.machine import memory_size
from components.lib.recipe.schema import Recipe
from components.lib.settings import ProcessSettings
from components.lib.sources.resolve import release_config
from components.lib.transformer.dequantise import opened
from components.lib.transformer.families import family_of, full_precision
from components.lib.transformer.gguf import gguf_of
from components.lib.transformer.layout import text_part

if TYPE_CHECKING:
    from pipeline.kubeflow.profile import Profile
    from pipeline.plan.stages import Need, Shape

PROCESS = 2**30
"""Bytes that a process takes beside its tensors: the libraries, or the context of CUDA."""

DIVIDING = ("auto", "fsdp")
"""The values of ESPALIER_PARALLEL with which several devices may divide a training."""

CURES: tuple[tuple[str, Any], ...] = (
    ("micro_batch_size", 1),
    ("gradient_checkpointing", True),
    ("offload_optimizer", True),
    ("teacher_top", 1024),
    ("precision", "bf16"),
    ("optimizer", "adamw-8bit"),
    ("trainable", "lora"),
)
"""Fields of a training that lower its memory, with the value that does; those that change the result the least come first."""


@dataclass(frozen=True)
class Device:
    """The device of a stage."""

    kind: str
    """cuda or cpu."""
    size: int | None
    """Bytes that tensors can take; None if it is not known."""
    said: str
    """The device in a sentence."""
    count: int = 1
    """How many devices may divide a training."""

    def shared_by(self, need: Need) -> int:
        """Return how many devices divide the stage: those that there are if it trains, else 1."""
        return self.count if need.trained else 1

    def takes(self, need: Need) -> int:
        """Return the bytes that a stage holds there: on each device if several divide it, which they do if one is too small."""
        devices = self.shared_by(need)
        if devices > 1:
            return need.divided(devices)
        return need.peak.total + (need.held if self.kind == "cpu" else 0)


def shape_of(release: str) -> Shape:
    """Return the shape of a release: a folder, a GGUF file, an s3:// prefix, a Hub id or models:/name@alias. Nothing but its config is read.

    Raises:
        Refusal: the release cannot be found, or its family is not supported.
    """
    from pipeline.plan.stages import Shape

    folder = Path(release).expanduser()
    if folder.exists():
        local = opened(folder)
        return Shape(local.config, local.dtype, unpacked=gguf_of(folder) is not None)
    config = full_precision(json.loads(release_config(release)))
    family_of(config)
    return Shape(config, str(config.get("dtype") or config.get("torch_dtype") or "float32"))


def here() -> Device:
    """Return the device of this machine."""
    # torch takes seconds to import, and the drivers' files say at once that there is no GPU.
    if any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/dxg")):
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            count = torch.cuda.device_count() if ProcessSettings().parallel in DIVIDING else 1
            return Device("cuda", properties.total_memory - PROCESS, f"this machine's {properties.name}", count)
    return Device("cpu", memory_size() - PROCESS, "this machine")


def device_of(profile: Profile, stage: str) -> Device:
    """Return the device that a profile gives a stage.

    The memory of a GPU is read from its name in `node_selector`, as in NVIDIA-A100-SXM4-80GB; a processor has the stage's `memory`.
    """
    needs = profile.needs(stage.removesuffix("-2").replace("-", "_"))
    if needs.gpu:
        count = needs.gpu.count * needs.nodes if profile.environment.get("ESPALIER_PARALLEL", "auto") in DIVIDING else 1
        for value in needs.node_selector.values():
            if found := re.search(r"(\d+)gb", value, re.IGNORECASE):
                return Device("cuda", int(found[1]) * 2**30 - PROCESS, f"the profile's {value}", count)
        return Device("cuda", None, f"the profile's {needs.gpu.type}", count)
    size = bytes_of(needs.memory) - PROCESS if needs.memory else None
    return Device("cpu", size, f"the profile's memory of {needs.memory}" if needs.memory else "the profile's nodes")


def bytes_of(quantity: str) -> int:
    """Return the bytes of a Kubernetes quantity.

    >>> bytes_of("4Gi"), bytes_of("5G"), bytes_of("7")
    (4294967296, 5000000000, 7)
    """
    number, unit = re.fullmatch(r"(\d+)([EPTGMK]?)i?", quantity).groups()  # type: ignore[union-attr]
    return int(number) * (1024 if quantity.endswith("i") else 1000) ** (" KMGTPE".index(unit) if unit else 0)


def require_memory(recipe: Recipe, release: str, profile: Profile | None = None) -> Iterator[str]:
    """Yield a warning for each stage of which it is not known whether it fits.

    A release that is small beside the device is not planned. One whose config cannot be read from here is not either: the stages may
    reach what this machine does not, and say what is wrong with it.

    Raises:
        Refusal: a stage takes more than its device has.
    """
    try:
        shape = shape_of(release)
    except Refusal:
        return
    device = None if profile else here()
    if device and device.size and rough(recipe, shape.config) < device.size:
        return
    from pipeline.plan.stages import needs

    kind = "cpu" if (device or device_of(profile, "regularize")).kind == "cpu" else "cuda"  # type: ignore[arg-type]
    try:
        planned = list(needs(recipe, shape, kind))  # type: ignore[arg-type]
    except Exception as error:  # a plan that fails must not stop a run that would not
        yield f"the memory of the stages is not known, since they could not be planned ({type(error).__name__}: {error})"
        return
    for need in planned:
        if not need.peak.total:
            continue
        place = device or device_of(profile, need.stage)  # type: ignore[arg-type]
        if place.size is None:
            yield f"{need.stage} takes {place.takes(need) / 1e9:.1f} GB, and {place.said} states no size: see that it has as much"
        elif place.takes(need) > place.size:
            raise Refusal(
                f"{need.stage} takes {place.takes(need) / 1e9:.3g} GB and {place.said} has {place.size / 1e9:.3g} GB: "
                f"{cure(recipe, shape, need, place)} (espalier plan shows every stage)"
            )


def rough(recipe: Recipe, config: Mapping[str, Any]) -> float:
    """Return more bytes than any stage takes, from a few fields of the config; infinity if they are missing."""
    config = text_part(config)
    try:
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        layers = config["num_hidden_layers"]
    except KeyError:
        return float("inf")
    wide = max(hidden, int(config.get("intermediate_size") or 4 * hidden)) * max(1, int(config.get("num_experts") or 1))
    weights = layers * (4 * hidden**2 + 3 * hidden * wide) + 2 * vocabulary * hidden
    evaluate = recipe.evaluate
    largest = max(recipe.regularize.batch_size, recipe.recover.batch_size, evaluate.batch_size, 8)
    tokens = largest * max(recipe.calibration.length, evaluate.length or 0)
    tokens = max(tokens, max(evaluate.speed.batches) * evaluate.speed.prompt * evaluate.speed.enabled)
    return 28 * weights + tokens * (16 * vocabulary + layers * 40 * (hidden + wide))


def cure(recipe: Recipe, shape: Shape, need: Need, device: Device) -> str:
    """Return what lets the stage fit: the first settings that do, each planned in turn."""
    from pipeline.plan.stages import needs

    if need.section == "methods":
        return "set the batch_size of the method to 1, or name a larger device"
    if need.section == "evaluate":
        return "set evaluate.batch_size to 1, or name a larger device"
    if need.section not in ("regularize", "recover"):
        return "name a larger device"
    tried: list[str] = []
    least = device.takes(need)
    for field, value in CURES:
        section = getattr(recipe, need.section)
        if field not in type(section).model_fields or getattr(section, field) == value:
            continue
        cured = recipe.model_copy(update={need.section: section.model_copy(update={field: value})})
        takes = max(map(device.takes, needs(cured, shape, device.kind, only=(need.stage,))))  # type: ignore[arg-type]
        if takes >= least:
            continue
        recipe, least = cured, takes
        tried.append(f"--set {need.section}.{field}={str(value).lower()}")
        if device.size and takes <= device.size:
            return f"it takes {takes / 1e9:.3g} GB with {' '.join(tried)}"
    return f"{_all(tried)}, and a larger device or a smaller release is needed"


def _all(tried: Sequence[str]) -> str:
    return f"{' '.join(tried)} is not enough" if tried else "no field saves memory"
