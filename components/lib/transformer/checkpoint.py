"""A Hugging Face checkpoint in a folder: read quickly from its headers, or loaded whole.

`Checkpoint.open` reads config.json and the safetensors headers of any model: enough to count, measure and serve it.
`PrunableCheckpoint.open` also refuses, before anything slow is imported, a checkpoint that cannot be cut: it opens every checkpoint
that is cut, trained or pinned as a release. `load_model` imports transformers, and refuses a load that left a tensor out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open

from components.lib.errors import Refusal
from components.lib.transformer.channels import widths_of
from components.lib.transformer.families import Config, Family, family_for, family_of
from components.lib.transformer.layout import LLAMA, Widths, text_part, with_text
from components.lib.transformer.packing import count_parameters
from components.lib.transformer.wrappers import WRAPPERS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""The files with the terms of a release, which every copy of it carries."""

# Constants that old releases stored beside the parameters (causal masks, rotary frequencies). transformers ignores them.
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, as the header describes it."""

    file: Path
    dtype: str
    """The safetensors name: F32, BF16, F16 …"""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    size: int
    """Bytes."""

    def pieces(self, length: int = 1 << 24) -> Iterator[bytes]:
        """Yield the tensor's bytes piece by piece, so that it is never held whole."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.size, length):
                yield file.read(min(length, self.size - done))

    def read(self) -> torch.Tensor:
        """Return the tensor, in memory."""
        import torch

        data = torch.frombuffer(bytearray(b"".join(self.pieces())), dtype=torch.uint8)
        return data.view(getattr(torch, _TORCH_NAMES[self.dtype])).reshape(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model in a folder, of any family, quantised or not."""

    folder: Path
    config: dict[str, Any]
    """config.json as it stands."""
    family: Family | None
    """The row of its `model_type`; None if the table has none. Of a wrapper, the row of its text model in it."""
    tensors: Mapping[str, Stored]
    """Every tensor by its name on disk, but for the constants of old releases."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json and the safetensors headers.

        Raises:
            Refusal: there is no config.json; there are no safetensors weights; or a shard is missing, cut short, or without a
                tensor that the index promises.
        """
        config = _read_config(folder)
        try:
            family: Family | None = family_for(config)
        except Refusal:
            family = None
        return cls(folder, _with_widths(config, family), family, _parameters(folder))

    @property
    def layers(self) -> int | None:
        """The number of layers; None if the config states it under no known name."""
        names = ((self.family.count,) if self.family else ()) + _LAYER_COUNTS
        return self._first_number(names)

    @property
    def longest_context(self) -> int | None:
        """How many tokens the model reads at most; None if the config states no bound."""
        return self._first_number(_CONTEXTS)

    @property
    def widths(self) -> Widths | None:
        """The widths; None if nothing of the family but layers can be removed, or if the config leaves them to its class."""
        layout, text = (self.family.layout or LLAMA) if self.family else LLAMA, text_part(self.config)
        if self.family is None or layout.hidden[0] not in text or layout.heads not in text:
            return None
        try:
            return widths_of(self.family, self.config)
        except Refusal:
            return None

    @cached_property
    def parameters(self) -> int:
        """The number of stored parameters, packed ones unpacked (`packing.py`); a tied head is stored once.

        Raises:
            Refusal: weights are packed and the config does not state their bits.
        """
        return count_parameters(self.tensors, self.config)

    @cached_property
    def bytes(self) -> int:
        """The size of the stored tensors, scales and zero points of a quantisation included."""
        return sum(tensor.size for tensor in self.tensors.values())

    @cached_property
    def dtype(self) -> str:
        """The dtype that holds the most bytes, by torch's name, such as bfloat16; int32 or uint8 for packed weights."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        largest = max(sizes, key=lambda dtype: sizes[dtype])
        return _TORCH_NAMES.get(largest, largest.lower())

    def _first_number(self, names: Iterable[str]) -> int | None:
        """Return the first of the config's fields that is a number; of a multimodal model, of its text model's."""
        parts = (self.config, text_part(self.config))
        found = (part[name] for part in parts for name in names if type(part.get(name)) is int)
        return next(found, None)


@dataclass(frozen=True)
class PrunableCheckpoint(Checkpoint):
    """A checkpoint that layers, and channels if its family has a layout, can be cut from."""

    family: Family

    @classmethod
    def open(cls, folder: Path, remote_code: bool = False) -> PrunableCheckpoint:
        """Read config.json and the safetensors headers, and refuse a checkpoint that cannot be pruned.

        Args:
            folder: a checkpoint.
            remote_code: whether the config may name code that comes with the model.

        Raises:
            Refusal: `Checkpoint.open` or `family_of` refuses it; its weights are quantised; or the stored blocks are not the
                config's layers.
        """
        config, family = checked(_read_config(folder), remote_code)
        return cls.of(folder, config, family, _parameters(folder))

    @classmethod
    def of(
        cls, folder: Path, config: dict[str, Any], family: Family, tensors: Mapping[str, Stored]
    ) -> PrunableCheckpoint:
        """Return the checkpoint of these tensors.

        Raises:
            Refusal: one is quantised, or their blocks are not the config's layers.
        """
        _check_dtypes(folder, tensors)
        _check_blocks(folder, config, family, tensors)
        return cls(folder, config, family, tensors)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.family.layers(self.config)

    @cached_property
    def ignored(self) -> tuple[str, ...]:
        """The names of the stored tensors that transformers ignores: heads for multi-token prediction. No export has them."""
        return tuple(name for name in self.tensors if self.family.ignores(name, self.config))


_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")

_FULL_PRECISION = ("F64", "F32", "F16", "BF16")
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def load_model(
    folder: Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        folder: a checkpoint that `Checkpoint.open` accepts.
        dtype: the stored one if None.
        device: the weights are put there as they are read; the CPU if None.
        remote_code: whether code that comes with the model may run.

    Raises:
        Refusal: a tensor was missing, unexpected or of another shape (transformers itself would fill it at random), or the
            library of its quantisation is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = str(_read_config(folder).get("model_type")) in WRAPPERS
    auto: Any = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    try:
        loaded: Any = auto.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map={"": device} if device else None,
            trust_remote_code=remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and refused below
            output_loading_info=True,
        )
    except ImportError as error:  # raised if the library of a quantisation is not installed
        raise _not_loadable(folder, error) from None
    model, loading = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    _check_loading(folder, loading)
    return model.eval()


def resolved_text(config: Config) -> Any:
    """Return a config as transformers' class fills it in, of a wrapper its text model's."""
    from transformers import CONFIG_MAPPING

    # transformers tags infinity in JSON, and takes the tag off where it reads a file; no field of layers or widths holds one.
    untagged = {name: value for name, value in config.items() if "__float__" not in json.dumps(value)}
    return CONFIG_MAPPING[config["model_type"]].from_dict(untagged).get_text_config()


def checked(config: dict[str, Any], remote_code: bool = False) -> tuple[dict[str, Any], Family]:
    """Return a config, of a wrapper with what it leaves to transformers' class written out, and its family.

    Raises:
        Refusal: as `family_of`.
    """
    if str(config.get("model_type")) in WRAPPERS:
        config = _with_widths(config, family_for(config))
    return config, family_of(config, remote_code)


def _with_widths(config: dict[str, Any], family: Family | None) -> dict[str, Any]:
    """Return a wrapper's config with the number of layers and the widths that it leaves to transformers' class written out."""
    if family is None or not family.wraps:
        return config
    text, layout = text_part(config), family.layout
    fields = [family.count, *((*layout.hidden, layout.ffn, layout.heads, layout.groups, layout.head) if layout else ())]
    absent = [field for field in fields if field and field not in text]
    if not absent:
        return config
    resolved = resolved_text(config)
    filled = {field: getattr(resolved, field, None) for field in absent}
    return with_text(config, {**text, **{field: value for field, value in filled.items() if value is not None}})


def require_loadable(folder: Path) -> None:
    """Check, without reading a weight, that the installed libraries can load a checkpoint.

    Raises:
        Refusal: transformers does not know the model's type or its quantisation, a library of the quantisation is not installed, or
            the model needs code of its own.
    """
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer

    try:
        stated = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
        if stated:
            quantizer = AutoHfQuantizer.from_config(stated, pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, ValueError) as error:
        raise _not_loadable(folder, error) from None


def _not_loadable(folder: Path, error: Exception) -> Refusal:
    reason = " ".join(str(error).split())[:200]
    return Refusal(
        f"{folder} cannot be loaded with the libraries installed here ({reason}): install those, or leave the model out"
    )


def _check_loading(folder: Path, loading: Mapping[str, Any]) -> None:
    """Refuse a load that left a tensor out, but for heads for multi-token prediction, of which transformers has no class."""
    checkpoint = Checkpoint.open(folder)
    family = checkpoint.family
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(tensor_told, loading[kind]))
        if kind == "unexpected_keys" and family:
            names = [name for name in names if not family.ignores(name, checkpoint.config)]
        if names:
            raise Refusal(
                f"{folder} does not hold the model its config.json describes: {len(names)} {kind.replace('_', ' ')}, such as "
                f"{', '.join(names[:3])}: get the release again"
            )


def tensor_told(key: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    """Return the name of a tensor that transformers did not load; of one of another shape, with both shapes."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} (stored {list(stored)}, the model has {list(wanted)})"


def load_tokenizer(folder: Path, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer. Raises Refusal if the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except (OSError, ValueError) as error:
        raise Refusal(
            f"{folder} has no tokenizer that can be read ({' '.join(str(error).split())[:120]}): put the release's tokenizer files there"
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise Refusal(f"{folder} holds adapters and no config.json: merge them into their base model first")
        if not folder.exists():
            raise Refusal(f"{folder} does not exist: name the folder of a Hugging Face checkpoint, or a GGUF file")
        raise Refusal(f"{folder} has no config.json: name the folder of a Hugging Face checkpoint")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path} cannot be read ({str(error)[:200]}): get the release again") from None
    if not isinstance(value, dict):
        raise Refusal(f"{path} holds {type(value).__name__}, not a mapping: get the release again")
    return value


def _parameters(folder: Path) -> dict[str, Stored]:
    """Return every stored tensor but the constants of old releases."""
    return {name: tensor for name, tensor in _stored(folder).items() if not name.endswith(_CONSTANTS)}


def _stored(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the files that transformers would load: one file, or the index's shards."""
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _weight_map(folder / INDEX)
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        raise Refusal(f"{folder / INDEX} names {', '.join(missing[:3])}, which the folder lacks: get the release again")
    tensors = {
        name: tensor for file in sorted(set(weight_map.values())) for name, tensor in _header(folder / file).items()
    }
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise Refusal(
            f"{folder / INDEX} promises {absent[0]}, which {weight_map[absent[0]]} lacks: get the release again"
        )
    return tensors


def _no_weights(folder: Path) -> Refusal:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return Refusal(
            f"{folder} holds pickled weights only ({pickled[0]}), which can run code when they are read: convert them to safetensors "
            "with save_pretrained if you trust them"
        )
    packed = sorted(path.name for path in folder.glob("*.gguf"))
    if packed:
        return Refusal(
            f"{folder} holds GGUF weights only ({packed[0]}), which are quantised: name the full-precision release that they were made from, or "
            f'dequantise them with AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="{packed[0]}") and save_pretrained'
        )
    return Refusal(f"{folder} holds neither {WEIGHTS} nor {INDEX}: name a folder with safetensors weights")


def _weight_map(path: Path) -> dict[str, str]:
    """Return the shard of each tensor. Raises Refusal if it is no name of a file right in the folder."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refusal(f"{path} has no 'weight_map' from tensors to files: get the release again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]{1,240}\.safetensors", file):
            raise Refusal(
                f"{path} says that {name} is in {str(file)[:80]!r}, which is no safetensors file of the folder: get the release again"
            )
    return weight_map


def _header(path: Path) -> dict[str, Stored]:
    """Read a safetensors header: 8 bytes of length, then JSON, then the tensors' bytes. The library checks it."""
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise Refusal(
            f"{path} is no whole safetensors file ({said}): it was cut short or changed, so get it again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }


def _check_dtypes(folder: Path, tensors: Mapping[str, Stored]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _FULL_PRECISION:
            raise Refusal(
                f"{folder} holds {name} as {tensor.dtype}, so its weights are quantised: prune the full-precision release, and quantise the result"
            )


def _check_blocks(folder: Path, config: Config, family: Family, tensors: Mapping[str, Stored]) -> None:
    """Refuse a folder whose tensors are of other layers than its config counts, as after a careless cut."""
    read = (name for name in tensors if not family.ignores(name, config))
    stored = {found[0] for found in map(family.block_of, read) if found}
    stated = family.layers(config)
    if beyond := [layer for layer in stored if layer >= stated]:
        raise Refusal(
            f"{folder} holds tensors of layer {min(beyond)}, but its {family.count} is {stated}: get the release again"
        )
    # Not a set of all layers: a damaged config may state billions.
    if len(stored) < stated:
        absent = next(layer for layer in range(stated) if layer not in stored)
        raise Refusal(
            f"{folder} has no tensors of layer {absent}, but its {family.count} is {stated}: get the release again"
        )
