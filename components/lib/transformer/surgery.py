"""Removing layers from a model in memory, and layers and channels from a checkpoint on disk without loading it.

Both renumber what is left and bring every per-layer config field in step (`families.cut_config`). Without that
a cut model loads without an error and generates wrong text.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal
from components.lib.transformer.channels import cut_widths, kept_rows, layout_of
from components.lib.transformer.checkpoint import INDEX, LICENCES, WEIGHTS, PrunableCheckpoint, Stored, resolved_text
from components.lib.transformer.experts import experts_of, kept_experts, without_expert
from components.lib.transformer.families import FAMILIES, Config, Family, cut_config, family_of, kept_layers
from components.lib.transformer.layout import text_part, with_text
from components.lib.transformer.selection import NO_CHANNELS, Channels
from components.lib.transformer.wrappers import WRAPPERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 5_000_000_000
"""The largest weights file that is written; a single larger tensor gets a file of its own."""

# The files that are copied with the weights: tokenizer, chat template, generation config, licence.
_COMPANIONS = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "additional_chat_templates",
    "generation_config.json",
    *LICENCES,
)


def drop_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Remove layers from a model in memory, in place, and return it.

    Raises:
        Refusal: a layer is not of the model, or none would stay.
    """
    from torch import nn

    from components.lib.transformer.gates import family_in, text_config

    family = family_in(model)
    cut = text_part(cut_config(model.config.to_dict(), family, layers))
    path, name = family.blocks.rsplit(".", 1)
    parent = model.get_submodule(path)
    blocks = getattr(parent, name)
    kept = kept_layers(len(blocks), layers)
    setattr(parent, name, nn.ModuleList(blocks[layer] for layer in kept))
    for new, block in enumerate(getattr(parent, name)):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new
    # A wrapper's text model may hold a copy of its config.
    configs = (text_config(model), getattr(parent, "config", None))
    for field in (*family.per_layer, family.count):
        for config in filter(None, configs):
            if field in cut:
                setattr(config, field, cut[field])
    return model


def cut_checkpoint(
    source: Path, out: Path, layers: Sequence[int] = (), channels: Channels = NO_CHANNELS, remote_code: bool = False
) -> None:
    """Write the checkpoint of `source` without `layers` and `channels` to the folder `out`.

    The tensors' bytes are copied as they are, so every dtype and layout is kept. At most one tensor is held in memory, and only
    if channels of it are removed.

    Args:
        source: the checkpoint to cut.
        out: the folder to fill.
        layers: indices of the layers to remove.
        channels: the channels to remove.
        remote_code: whether the source's own code is copied.

    Raises:
        Refusal: `source` cannot be pruned, a layer is not of the model, or none would stay.
    """
    checkpoint = PrunableCheckpoint.open(source, remote_code)
    warn_of_dropped(checkpoint)
    tensors, config = remaining(checkpoint, layers, channels), remaining_config(checkpoint, layers, channels)
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out, tensors)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    carry(source, out, remote_code)


def text_alone(checkpoint: PrunableCheckpoint) -> PrunableCheckpoint:
    """Return the text model of a wrapper as a checkpoint of its own, whose tensors lie in the wrapper's files.

    Raises:
        Refusal: transformers has no class for the text model alone.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = checkpoint.family
    if family.wraps not in FAMILIES or not WRAPPERS[family.model_type].alone:
        raise Refusal(
            f"text_only is true, but transformers has no class for the text model of {family.title} alone that computes what it computes in "
            "the wrapper: set it to false, and the text model is pruned in place"
        )
    named = ((family.alone(name), tensor) for name, tensor in checkpoint.tensors.items())
    tensors = {name: tensor for name, tensor in named if name is not None}
    config = {
        "dtype": checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or checkpoint.dtype,
        **text_part(checkpoint.config),
        "model_type": family.wraps,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.wraps]],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    return PrunableCheckpoint(checkpoint.folder, config, family_of(config), tensors)


def write(checkpoint: PrunableCheckpoint, out: Path) -> None:
    """Write a checkpoint whose tensors lie in other files, or are computed from them, to the folder `out`, with the files beside its weights."""
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out, checkpoint.tensors)
    (out / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n")
    carry(checkpoint.folder, out)
    if (checkpoint.folder / "README.md").is_file():  # its licence is repeated in the card of the candidate
        shutil.copyfile(checkpoint.folder / "README.md", out / "README.md")
    if not checkpoint.family.wraps:  # of a wrapper whose text model was taken out
        for path in out.glob("*processor_config.json"):
            path.unlink()


def warn_of_dropped(checkpoint: PrunableCheckpoint) -> None:
    """Log which tensors of a release an export does not have, since transformers ignores them."""
    if checkpoint.ignored:
        logging.getLogger(__name__).warning(
            "%s: %d tensors of heads for multi-token prediction, such as %s, are dropped: transformers does not load them",
            checkpoint.folder,
            len(checkpoint.ignored),
            checkpoint.ignored[0],
        )


def written_out(config: Config, family: Family) -> dict[str, Any]:
    """Return the config with every per-layer field that it leaves to transformers' config class to fill in, written out."""
    text = text_part(config)
    absent = [field for field in family.per_layer if text.get(field) is None]
    if not absent:
        return dict(config)
    resolved = resolved_text(config)
    # A second name of a field that the config has (`layers_block_type` of `layer_types`) stays absent.
    names = {**resolved.attribute_map, **{name: other for other, name in resolved.attribute_map.items()}}
    filled = {field: getattr(resolved, field, None) for field in absent if names.get(field) not in text}
    return with_text(config, dict(text) | {field: value for field, value in filled.items() if value is not None})


def remaining_config(checkpoint: PrunableCheckpoint, layers: Sequence[int], channels: Channels) -> dict[str, Any]:
    """Return the config of the checkpoint without `layers` and `channels`."""
    family = checkpoint.family
    return cut_widths(cut_config(written_out(checkpoint.config, family), family, layers), family, channels)


def remaining(checkpoint: PrunableCheckpoint, layers: Sequence[int], channels: Channels) -> dict[str, Stored]:
    """Return the tensors of the checkpoint without `layers` and `channels`, by their names in the cut checkpoint.

    Raises:
        Refusal: the family's layout does not know a tensor that may hold channels.
    """
    number = {old: new for new, old in enumerate(kept_layers(checkpoint.layers, layers))}
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if checkpoint.family.ignores(name, checkpoint.config):
            continue
        block = checkpoint.family.block_of(name)
        if block is None:
            tensors[name] = _sliced(checkpoint, name, tensor, channels, None)
        elif block[0] in number:
            layer, start, end = block
            new = without_expert(name, channels.experts_at(layer))
            if new is not None:
                tensors[f"{new[:start]}{number[layer]}{new[end:]}"] = _sliced(checkpoint, name, tensor, channels, layer)
    return tensors


def _sliced(checkpoint: PrunableCheckpoint, name: str, tensor: Stored, channels: Channels, layer: int | None) -> Stored:
    if channels.narrow:
        layout = layout_of(checkpoint.family)
        kept = kept_rows(layout, layout.widths(checkpoint.config), name, tensor.shape, channels.at(layer))
    elif channels.experts and layer is not None:
        experts = experts_of(checkpoint.family, checkpoint.config).count
        kept = kept_experts(experts, name, tensor.shape, channels.experts_at(layer))
    else:
        return tensor
    if all(rows is None for rows in kept):
        return tensor
    shape = tuple(size if rows is None else len(rows) for rows, size in zip(kept, tensor.shape, strict=True))
    size = _width(tensor) * prod(shape)
    return Sliced(tensor.file, tensor.dtype, shape, tensor.start, size, whole=tensor.shape, kept=tuple(kept))


@dataclass(frozen=True)
class Sliced(Stored):
    """The remaining rows and columns of a stored tensor."""

    whole: tuple[int, ...]
    """The shape as it is stored."""
    kept: tuple[list[int] | None, ...]
    """For each dimension the indices that stay, or None if all stay."""

    def pieces(self, length: int = 1 << 24) -> Iterator[bytes]:
        """Yield the remaining bytes, in one piece."""
        import numpy

        # The numbers are moved and not computed with, so any type of the same width serves.
        found: Any = numpy.memmap(self.file, f"u{_width(self)}", mode="r", offset=self.start, shape=self.whole)
        for dimension, rows in enumerate(self.kept):
            if rows is not None:
                found = found.take(rows, axis=dimension)
        yield found.tobytes()


def carry(source: Path, out: Path, remote_code: bool = False) -> None:
    """Copy the files beside the weights: tokenizer, chat template, generation config, licence; the model's code with `remote_code`."""
    for pattern in (*_COMPANIONS, *(["*.py"] if remote_code else [])):
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, out / path.name)


def rewrite_weights(out: Path, tensors: Mapping[str, Stored]) -> None:
    """Write the weights of a checkpoint anew from tensors that are read from its own files."""
    fresh = out / ".fresh"
    fresh.mkdir()
    _write_weights(fresh, tensors)
    for path in (*out.glob("*.safetensors"), out / INDEX):
        path.unlink(missing_ok=True)
    for path in fresh.iterdir():
        path.rename(out / path.name)
    fresh.rmdir()


def _write_weights(out: Path, tensors: Mapping[str, Stored]) -> None:
    """Write one file, or shards and their index."""
    shards = list(_shards(tensors))
    if len(shards) == 1:
        _write_shard(out / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(out / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(tensor.size for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, Stored]) -> Iterator[dict[str, Stored]]:
    """Divide the tensors, in their order, into shards of at most SHARD_BYTES."""
    shard: dict[str, Stored] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.size > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.size
    yield shard


def _write_shard(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file (8 bytes of header length, JSON header, bytes) by copying each tensor's bytes from its own file.

    The safetensors library writes tensors from memory only; this holds no more than a copy buffer.
    """
    # As the library does, the widest dtypes first: every tensor is aligned to its own width.
    ordered = dict(sorted(tensors.items(), key=lambda item: -_width(item[1])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.writelines(tensor.pieces())


def _width(tensor: Stored) -> int:
    """Bytes of one element."""
    return {"F64": 8, "F32": 4}.get(tensor.dtype, 2)
