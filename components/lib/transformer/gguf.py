"""A release in a GGUF file, turned into the plain checkpoint that transformers makes of it.

A GGUF file holds weights, settings and tokenizer. transformers reads some architectures, and passes over a tensor or a setting that it does
not know: the model would compute something else without a warning. So every tensor and every setting of a file is compared with the model
that transformers makes (`gguf_checks.py`).

The whole model is in memory when it is unpacked.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal
from components.lib.transformer.checkpoint import INDEX, LICENCES, WEIGHTS, PrunableCheckpoint, Stored, tensor_told
from components.lib.transformer.families import family_of
from components.lib.transformer.gguf_checks import FACTORS, check_settings, heads_of, with_factors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import PreTrainedModel

_PLAIN = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
"""The types of tensors that are not quantised: torch's name and the bytes of an element. Norms are in F32 beside any of them."""


def gguf_of(release: Path) -> Path | None:
    """Return the GGUF file that a release is: the path itself, or the only one of a folder without safetensors weights; else None.

    Raises:
        Refusal: the folder holds several.
    """
    if release.suffix == ".gguf" and release.is_file():
        return release
    if any((release / name).is_file() for name in (WEIGHTS, INDEX)):
        return None
    files = sorted(release.glob("*.gguf"))
    if len(files) > 1:
        raise Refusal(
            f"{release} holds {len(files)} GGUF files, such as {files[0].name} and {files[1].name}: name one of them"
        )
    return files[0] if files else None


@dataclass(frozen=True)
class Promise:
    """The contents of a GGUF file, before a weight is read."""

    checkpoint: PrunableCheckpoint
    """The checkpoint that `unpack` writes: its config, and the names and shapes of its tensors, which cannot be read."""
    heads: tuple[str, ...]
    """The names of tensors that are left out: heads for multi-token prediction, of which transformers has no class."""
    types: str
    """The types that matrices are stored in, the one with the most bytes first, such as `Q4_K, Q6_K`."""
    cure: str
    """The release to name instead, in words."""


def promised(file: Path) -> Promise:
    """Return what a GGUF file holds, before a weight is read.

    Raises:
        Refusal: the package gguf is not installed; the file is cut short or one of several parts; it holds an architecture, a tensor or a
            setting that transformers does not read; or the family is not supported.
    """
    found = file.stat()
    return _promised(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4)  # transformers takes seconds to read the words of a tokenizer
def _promised(file: Path, size: int, changed: int) -> Promise:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings, reader = _opened(file)
    cure = _cure(settings)
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(
            f"{file} is of the architecture {settings['general.architecture']!r}, of which transformers makes no model ({_said(error)}): {cure}"
        ) from None
    factors = next((tensor for tensor in reader.tensors if tensor.name == FACTORS), None)
    if factors is not None:
        config = with_factors(file, torch.tensor(factors.data), config, cure)
    dtype, width = _PLAIN[_target(reader)]
    stated = json.loads(config.to_json_string()) | {"dtype": dtype}
    family = family_of(stated)
    numbers = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    check_settings(file, settings, tuple(numbers), config, cure)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = _state(model)
    numbers.pop(FACTORS, None)
    heads: tuple[str, ...] = ()
    # Numbers first, since it takes seconds to find the names.
    if sum(numbers.values()) != sum(tensor.numel() for tensor in state.values()):
        heads = heads_of(file, settings["general.architecture"], numbers, model, family, cure)
    tensors = {
        name: Stored(file, _target(reader), tuple(tensor.shape), 0, width * tensor.numel())
        for name, tensor in state.items()
    }
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    types = ", ".join(sorted(sizes, key=lambda name: -sizes[name]))
    return Promise(PrunableCheckpoint.of(file.parent, stated, family, tensors), heads, types, cure)


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the parameters and buffers that a checkpoint of the model holds: a tied head once."""
    once = dict(model.named_parameters())
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - once.keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in again}


def unpack(release: Path, out: Path) -> None:
    """Write the plain checkpoint of a release in a GGUF file, with its tokenizer, to the folder `out`.

    Quantised weights become bf16, others keep their type. If the release is a folder, its card and its licence travel.

    Raises:
        Refusal: as `promised`; or the weights or the tokenizer cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = gguf_of(release)
    assert file is not None, "the release is a GGUF file"
    promise = promised(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise Refusal(
            f"the tokenizer of {file} cannot be read by transformers ({_said(error)}): {promise.cure}"
        ) from None
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=AutoConfig.for_model(**promise.checkpoint.config),
            dtype=getattr(torch, promise.checkpoint.dtype),
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
            ignore_mismatched_sizes=True,  # so that they are reported, and refused below
            output_loading_info=True,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise Refusal(f"{file} cannot be read by transformers ({_said(error)}): {promise.cure}") from None
    wrong = sorted(
        {tensor_told(key) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in loading[kind]}
    )
    if wrong:
        raise Refusal(
            f"{file} does not hold the model that its settings describe: {len(wrong)} tensors are missing, left over or of another shape, such "
            f"as {wrong[0]}: get the release again"
        )
    if promise.heads:
        logging.getLogger(__name__).warning(
            "%s: %d tensors of heads for multi-token prediction, such as %s, are dropped: transformers does not load them",
            file,
            len(promise.heads),
            promise.heads[0],
        )
    model.config.__dict__.pop("quantization_config", None)  # it is quantised no longer
    model.save_pretrained(out, max_shard_size="5GB")
    tokenizer.save_pretrained(out)
    if release.is_dir():
        for pattern in ("README.md", *LICENCES):
            for path in release.glob(pattern):
                shutil.copyfile(path, out / path.name)


def _opened(file: Path) -> tuple[dict[str, Any], GGUFReader]:
    """Return the settings of a file, and its tensors without their data.

    Raises:
        Refusal: the package gguf is not installed, or the file is cut short or one of several parts.
    """
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        from gguf import GGUFReader
    except ImportError:
        raise Refusal(
            f"{file} is a GGUF file, and the package gguf, which reads it, is not installed: install espalier[gguf], or name a release in "
            "safetensors"
        ) from None
    try:
        # This reader checks bounds; the other one needs that, since it would follow a damaged count for ever.
        settings, _ = read_gguf_metadata(str(file))
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise Refusal(
            f"{file} is no whole GGUF file ({_said(error)}): it was cut short or changed, so get it again"
        ) from None
    if int(settings.get("split.count") or 1) > 1:
        raise Refusal(
            f"{file} is one of {settings['split.count']} parts of a model: join them with llama-gguf-split --merge, and name the result"
        )
    return settings, reader


def _target(reader: GGUFReader) -> str:
    """Return the type that the weights get: that of the file's matrices, or BF16 if they are quantised."""
    types = {tensor.tensor_type.name for tensor in reader.tensors}
    return next((name for name in _PLAIN if name in types), "BF16") if types <= _PLAIN.keys() else "BF16"


def _cure(settings: Mapping[str, Any]) -> str:
    """Say which release to name instead; the metadata may name one."""
    urls = (
        settings.get(name) for name in ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url")
    )
    found = (re.search(r"huggingface\.co/([\w.-]+/[\w.-]+)", str(url)) for url in urls)
    named = next((match[1] for match in found if match), None)
    return f"name the release in safetensors that it was made from{f' (it names {named})' if named else ''}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
