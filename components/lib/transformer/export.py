"""Write plain Hugging Face checkpoints, and prove that they compute the same as the models they come from."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from components.lib.errors import Refusal
from components.lib.transformer.channels import widths_of
from components.lib.transformer.checkpoint import PrunableCheckpoint, Stored, load_model
from components.lib.transformer.families import cut_config
from components.lib.transformer.gates import blocks, skipped, text_config
from components.lib.transformer.layout import Axis
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import NO_CHANNELS, Channels
from components.lib.transformer.surgery import (
    carry,
    remaining,
    remaining_config,
    rewrite_weights,
    warn_of_dropped,
    written_out,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VerificationError(Exception):
    """An exported checkpoint is not the model it should be."""


def save_model(
    model: PreTrainedModel, source: Path, out: Path, removed: Sequence[int] = (), remote_code: bool = False
) -> None:
    """Write a model as a plain Hugging Face checkpoint: safetensors of at most 5 GB, each tensor in the dtype that its source has it in.

    The config, tokenizer, chat template and generation config are the source's own files, so any program that reads the release
    reads the export. A model of another dtype (fp32 masters of a bf16 release) is cast in place, parameter by parameter,
    without a second copy: afterwards it computes the same as the checkpoint.

    Args:
        model: a causal language model, peft adapters merged.
        source: the checkpoint it comes from.
        out: the folder to fill.
        removed: the layers of the source that the model no longer has.
        remote_code: whether the source's own code is copied.

    Raises:
        ValueError: the model still has adapters, or its layers are not those of the source without `removed`.
    """
    checkpoint = PrunableCheckpoint.open(source, remote_code)
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("the model still has adapters: call merge_and_unload() first")
    if len(blocks(model)) != checkpoint.layers - len(set(removed)):
        raise ValueError(
            f"the model has {len(blocks(model))} layers, but {source} has {checkpoint.layers} of which {len(set(removed))} are removed"
        )
    out.mkdir(parents=True, exist_ok=True)
    _cast(model, getattr(torch, checkpoint.dtype))
    _save_weights(model, out)
    warn_of_dropped(checkpoint)
    config = checkpoint.config
    if removed or checkpoint.ignored:
        config = cut_config(written_out(config, checkpoint.family), checkpoint.family, removed)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    carry(source, out, remote_code)
    _as_in_source(out, remaining(checkpoint, removed, NO_CHANNELS), remote_code)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters as a fresh load has them, and not the buffers: rotary frequencies stay fp32, and so do the routers of some families."""
    whole = tuple(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else ()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in whole):
            parameter.data = parameter.data.to(dtype)


def _as_in_source(out: Path, source: Mapping[str, Stored], remote_code: bool) -> None:
    """Give the tensors of an export that the source has in another dtype than the model that dtype again, and its own bytes if they are the same."""
    saved = PrunableCheckpoint.open(out, remote_code)
    base = f"{saved.family.blocks.split('.')[0]}."
    before = {name.removeprefix(base): tensor for name, tensor in source.items()}
    pairs = ((name, tensor, before.get(name.removeprefix(base))) for name, tensor in saved.tensors.items())
    other = {
        name: Recast(was.file, was.dtype, was.shape, was.start, was.size, saved=tensor, was=was)
        for name, tensor, was in pairs
        if was is not None and was.dtype != tensor.dtype and was.shape == tensor.shape
    }
    if other:
        rewrite_weights(out, {**saved.tensors, **other})


@dataclass(frozen=True)
class Recast(Stored):
    """A saved tensor in the dtype that the source has it in."""

    saved: Stored
    was: Stored

    def pieces(self, length: int = 1 << 24) -> Iterator[bytes]:
        """Yield the source's bytes if the tensor is the source's, rounded to the model's dtype; else its own values."""
        saved, was = self.saved.read(), self.was.read()
        found = was if torch.equal(was.to(saved.dtype), saved) else saved.to(was.dtype)
        yield found.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _save_weights(model: PreTrainedModel, out: Path) -> None:
    """Save with transformers, which knows tied weights and the layout of experts on disk."""
    from transformers import GenerationConfig

    # Releases carry generation configs that transformers reads but refuses to write; the source's file is carried instead.
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(out, max_shard_size="5GB")
    finally:
        model.generation_config = generation
    (out / "generation_config.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class Narrowing:
    """How many channels of one axis a checkpoint had before and after a cut: of hidden in all, of ffn, heads and experts in each layer."""

    before: int
    after: int
    removed: int


@dataclass(frozen=True)
class Verification:
    """The facts of an export that were checked and found right."""

    layers: int
    """Layers of the export."""
    tensors: int
    parameters: int
    bytes: int
    dtype: str
    device: str
    tokens: int
    """Real tokens whose logits were compared."""
    max_difference: float
    """Largest difference between the two models' logits."""
    cache_difference: float
    """Largest difference between cached and uncached logits, relative to the largest logit: rounding only."""
    removed: tuple[int, ...] = ()
    """The layers of the source that were cut, ascending."""
    channels: Mapping[Axis, Narrowing] = field(default_factory=dict)
    """The axes whose channels were cut; the indices are in `selection.json`."""
    dropped: tuple[str, ...] = ()
    """The tensors of the source that transformers ignores: heads for multi-token prediction."""

    def save(self, folder: Path) -> None:
        """Write `verification.json`."""
        (folder / "verification.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def verify_cut(
    source: Path,
    out: Path,
    layers: Sequence[int] = (),
    channels: Channels = NO_CHANNELS,
    device: str | torch.device | None = None,
    remote_code: bool = False,
) -> Verification:
    """Prove that `out` is `source` without `layers` and `channels`.

    1. config.json is the source's with every per-layer field and every width in step, and every tensor on disk equals, byte
       for byte, the remaining part of the source's tensor; none is missing or left over.
    2. The reloaded model's logits equal those of the source with the layers skipped and the channels gated to 0 by hooks. Layers
       alone: bit for bit, since the same operations run on the same numbers on the same device. With channels: within rounding,
       since sums over fewer numbers are taken in another order. Left-padded batches are among the prompts.
    3. Cached greedy generation equals a full pass over its own text, within rounding (the two multiply matrices of other shapes).

    One model is in memory at a time.

    Args:
        source: the checkpoint that was cut.
        out: the cut one.
        layers: the layers that were removed.
        channels: the channels that were removed.
        device: the device the models run on; the CPU if None. Their dtype is the release's.
        remote_code: whether the model's own code may run.

    Raises:
        VerificationError: one of the three does not hold.
    """
    original, cut = PrunableCheckpoint.open(source, remote_code), _opened(out, remote_code)
    _verify_config(original, cut, remaining_config(original, layers, channels))
    _verify_tensors(original, cut, remaining(original, layers, channels))
    model = load_model(source, device=device, remote_code=remote_code)
    with skipped(model, layers), narrowed(model, channels):
        expected = answers(model)
    del model
    verified = verify_export(expected, out, device, remote_code, exact=not channels)
    return replace(
        verified,
        removed=tuple(sorted(set(layers))),
        channels=_narrowings(original, cut, channels),
        dropped=original.ignored,
    )


def _narrowings(original: PrunableCheckpoint, cut: PrunableCheckpoint, channels: Channels) -> dict[Axis, Narrowing]:
    """Count the channels of each axis that was cut, in both configs."""
    if not channels:
        return {}
    before, after = widths_of(original.family, original.config), widths_of(cut.family, cut.config)
    return {axis: Narrowing(before.of(axis), after.of(axis), channels.count(axis)) for axis in channels.axes}


def verify_export(
    expected: Tensor,
    out: Path,
    device: str | torch.device | None = None,
    remote_code: bool = False,
    exact: bool = True,
) -> Verification:
    """Prove that a checkpoint gives the logits of the model it was exported from, with its key-value cache and without.

    Args:
        expected: the `answers` of the model that was exported, on the same device and in the same dtype.
        out: the export.
        device: the device the model runs on; the CPU if None.
        remote_code: whether the model's own code may run.
        exact: whether the logits must be equal bit for bit, and not within rounding.

    Raises:
        VerificationError: `out` does not load whole, its logits are others, or its cached generation is not its uncached one.
    """
    checkpoint = _opened(out, remote_code)
    gc.collect()
    try:
        model = load_model(out, device=device, remote_code=remote_code)
    except Refusal as refusal:
        raise VerificationError(str(refusal)) from None
    found = answers(model)
    difference = _difference(expected, found)
    rounding = 0.0 if exact else _ROUNDING[model.dtype] * expected.abs().max().item()
    if not difference <= rounding:  # so that NaN fails
        raise VerificationError(
            f"{out} does not compute what it was exported from: its logits differ by up to {difference:.3g}"
        )
    cache_difference = _cache_difference(model, out)
    # A recurrent state is summed step by step with the cache and in chunks without: 2.3e-4 was seen of a Nemotron-H in fp32.
    cache_rounding = _ROUNDING[model.dtype] * (10 if getattr(model, "_is_stateful", False) else 1)
    if not cache_difference <= cache_rounding:  # so that NaN fails
        raise VerificationError(
            f"{out} generates other text with its key-value cache than without: the logits differ by {cache_difference:.3g} "
            f"of the largest, and rounding explains {cache_rounding}"
        )
    return Verification(
        layers=checkpoint.layers,
        tensors=len(checkpoint.tensors),
        parameters=checkpoint.parameters,
        bytes=checkpoint.bytes,
        dtype=checkpoint.dtype,
        device=str(model.device),
        tokens=len(found),
        max_difference=difference,
        cache_difference=cache_difference,
    )


# The largest change of a logit by another order of summation, relative to the largest logit: some tens of units in the last place.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.inference_mode()
def answers(model: PreTrainedModel) -> Tensor:
    """Return the logits of a few short prompts of random tokens, padded on the left and not: (real tokens, vocabulary), on the CPU."""
    tokens, mask = _prompts(model)
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[mask.bool()].cpu()


def _prompts(model: PreTrainedModel, length: int = 24) -> tuple[Tensor, Tensor]:
    """Return (tokens, attention mask), each (batch, length): two full rows, and two padded on the left."""
    config = text_config(model)
    length = min(length, getattr(config, "max_position_embeddings", length) // 2)
    padding = torch.tensor([0, 0, length // 3, length // 2])
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (len(padding), length), generator=draw)
    mask = torch.arange(length).expand_as(tokens) >= padding[:, None]
    return tokens.to(model.device), mask.long().to(model.device)


def _cache_difference(model: PreTrainedModel, out: Path) -> float:
    """Return the largest difference between the logits of cached and uncached greedy generation, relative to the largest logit.

    A row is compared up to and including the first step at which the two choose different tokens.
    """
    uncached, uncached_logits = _generate(model, use_cache=False)
    try:
        cached, cached_logits = _generate(model, use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:  # raised by layers that share a part of the cache, or read beyond it
        raise VerificationError(f"{out} cannot generate with its key-value cache: {error}") from error
    # (batch, steps): whether everything before a step is equal.
    same = torch.cumprod((cached == uncached).long(), dim=1).roll(1, dims=1)
    same[:, 0] = 1
    difference = (cached_logits - uncached_logits).abs().amax(dim=-1)[same.bool()]
    return (difference.max() / uncached_logits.abs().max()).item()


def _generate(model: PreTrainedModel, use_cache: bool, steps: int = 8) -> tuple[Tensor, Tensor]:
    """Return the greedily generated tokens, (batch, steps), and the logits they come from, (batch, steps, vocabulary), in fp32."""
    tokens, mask = _prompts(model)
    generate: Any = model.generate
    with _greedy(model):
        generated = generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=steps,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return generated.sequences[:, -steps:], torch.stack(generated.logits, dim=1).float()


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[None]:
    """Replace the release's own generation settings for a while: no sampling, and no end of text."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig(do_sample=False, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own


def _opened(out: Path, remote_code: bool) -> PrunableCheckpoint:
    try:
        return PrunableCheckpoint.open(out, remote_code)
    except Refusal as refusal:
        raise VerificationError(str(refusal)) from None


def _verify_config(source: PrunableCheckpoint, out: PrunableCheckpoint, expected: Mapping[str, Any]) -> None:
    """Compare config.json with the expected one: short prompts would not reveal a sliding window in the wrong layer."""
    for name in sorted(set(expected) | set(out.config)):
        if expected.get(name) != out.config.get(name):
            raise VerificationError(
                f"{out.folder}/config.json's {name} is {out.config.get(name)!r} and should be {expected.get(name)!r}"
            )


def _verify_tensors(source: PrunableCheckpoint, out: PrunableCheckpoint, remaining: Mapping[str, Stored]) -> None:
    """Compare every tensor of `out` with the remaining part of the source's, byte for byte and one at a time."""
    base = f"{source.family.blocks.split('.')[0]}."
    expected = {name.removeprefix(base): tensor for name, tensor in remaining.items()}
    found = {name.removeprefix(base): tensor for name, tensor in out.tensors.items()}
    wrong = sorted(set(expected) ^ set(found))
    if wrong:
        raise VerificationError(
            f"{out.folder} {'lacks' if wrong[0] in expected else 'holds the left-over'} tensor {wrong[0]} (and {len(wrong) - 1} more are wrong)"
        )
    for name, tensor in expected.items():
        if not _same_bytes(tensor, found[name]):
            raise VerificationError(f"{out.folder} holds another {name} than {source.folder}")


def _same_bytes(a: Stored, b: Stored) -> bool:
    """Say whether two stored tensors have the same dtype, shape and bytes."""
    if (a.dtype, a.shape, a.size) != (b.dtype, b.shape, b.size):
        return False
    with b.file.open("rb") as other:
        other.seek(b.start)
        return all(other.read(len(piece)) == piece for piece in a.pieces())


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite for other shapes."""
    return (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
