"""Compare a GGUF file with the model that transformers makes of it: nothing of the file may be passed over in silence.

A setting that the model's config does not have is refused by its name, and so is a tensor that nothing of the model is made of. Two kinds of
tensors are known beside the model's: the factors of Llama 3's rotary frequencies, which become settings of the config, and the heads for
multi-token prediction, which are left out and named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal
from components.lib.transformer.family import Family

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

FACTORS = "rope_freqs.weight"
"""The tensor by which the rotary frequencies are divided, one number for each."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What the releases of Llama 3.1 to 3.3 set beside the largest factor."""

_SHAPES = frozenset(
    (
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_shared_feed_forward_length",
        "feed_forward_length",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        "tensor_data_layout",
        "vocab_size",
    )
)
"""Settings that the shapes of tensors show, so that a model that lacks one does not load, and two that change no number."""

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""Settings, each with the names of the config's field that has to have its value; the first that the config has."""


def check_settings(
    file: Path, settings: Mapping[str, Any], names: Sequence[str], config: PreTrainedConfig, cure: str
) -> None:
    """Check that the config has every setting of the file's architecture, with the same value.

    Args:
        file: the GGUF file.
        settings: its settings.
        names: the names of its tensors.
        config: the config that transformers makes of it.
        cure: the release to name instead, in words.

    Raises:
        Refusal: it lacks one.
    """
    prefix = f"{settings['general.architecture']}."
    read = _read_by_function(settings, names)
    for name, value in settings.items():
        setting = name.removeprefix(prefix)
        if setting == name or name in read or setting in _SHAPES or not value or value == "none":
            continue
        if not any(_same(found, value) for found in _in_config(setting, config)):
            raise Refusal(
                f"{file} sets {name} to {value!r}, which transformers does not read, so that the model would compute something else: {cure}"
            )


class _Noted(dict[str, Any]):
    """Settings that note which of them are read."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def _read_by_function(settings: Mapping[str, Any], names: Sequence[str]) -> Collection[str]:
    """Return the settings that transformers' own function for the architecture reads; none if it has no function for it."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config

    if settings["general.architecture"] not in GGUF_CONFIG_ARCHS:
        return ()
    noted = _Noted(settings)
    get_gguf_config(noted, tuple(names))
    return noted.read


def _same(found: object, value: object) -> bool:
    """Compare two settings: a file holds numbers in fp32."""
    numbers = isinstance(found, int | float) and isinstance(value, int | float)
    return isclose(found, value, rel_tol=1e-5) if numbers else found == value  # type: ignore[arg-type]


def _in_config(setting: str, config: PreTrainedConfig) -> Iterator[Any]:
    """Yield the values that a config has for a setting."""
    if setting == "rope.freq_base":
        # One for all layers, or one for each type of layers.
        rope = getattr(config, "rope_parameters", None) or {}
        yield from (
            part["rope_theta"] for part in (rope, *rope.values()) if isinstance(part, Mapping) and "rope_theta" in part
        )
    elif setting in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        part = rope.get("partial_rotary_factor", 1) if setting == "rope.dimension_count" else 1
        yield head * part
    else:
        yield next((getattr(config, name) for name in _FIELDS.get(setting, ()) if hasattr(config, name)), None)


def heads_of(
    file: Path, architecture: str, names: Iterable[str], model: PreTrainedModel, family: Family, cure: str
) -> tuple[str, ...]:
    """Return the names of a file's heads for multi-token prediction, of which transformers makes nothing.

    A tensor that the file lacks is found when it is loaded.

    Args:
        file: the GGUF file.
        architecture: its architecture.
        names: its tensors, but for the factors.
        model: the model that transformers makes of it.
        family: the model's row.
        cure: the release to name instead, in words.

    Raises:
        Refusal: nothing of the model is made of a tensor, and it belongs to no such head.
    """
    targets = _targets(architecture, names, model)
    heads = tuple(name for name, target in targets.items() if target is not None and target.startswith(family.ignored))
    has = model.state_dict().keys()
    unread = [name for name, target in targets.items() if target not in has and name not in heads]
    if unread:
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise Refusal(
            f"{file} holds the tensor {unread[0]}{more}, which transformers does not read, so that the model would compute something else: {cure}"
        )
    return heads


def _targets(architecture: str, names: Iterable[str], model: PreTrainedModel) -> dict[str, str | None]:
    """Return the name in the model of what each tensor becomes; None for one that transformers does not know."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.gguf import GGUF_ARCHS, get_gguf_conversion_mapping
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    # transformers reads some architectures by its own lists of names, and the older ones by those of the package gguf.
    if architecture in GGUF_ARCHS:
        mapping = get_gguf_conversion_mapping(architecture, model.config)
        renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        converters = [step for step in mapping if isinstance(step, WeightConverter)]
        return {name: rename_source_key(name, renamings, converters)[0] for name in names}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    try:
        known = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError:  # the package gguf has no list for the model's type
        known = {}
    return {name: known.get(name, known.get(name.removesuffix(".weight"))) for name in names}


def with_factors(file: Path, factors: Tensor, config: PreTrainedConfig, cure: str) -> PreTrainedConfig:
    """Return the config with the settings of Llama 3's rotary frequencies that give these factors.

    Args:
        file: the GGUF file.
        factors: the numbers by which its tensor `FACTORS` divides the frequencies.
        config: the config that transformers makes of the file.
        cure: the release to name instead, in words.

    Raises:
        Refusal: the settings of Llama 3.1 to 3.3 do not give these factors, to the rounding of fp32.
    """
    import torch

    plain = getattr(config, "rope_parameters", None) or {}
    scaled = config.__class__.from_dict(config.to_dict())
    scaled.rope_parameters = {**plain, **_LLAMA3, "rope_type": "llama3", "factor": float(factors.max())}
    if plain.get("rope_type") == "default" and torch.allclose(_factors(scaled), factors.float(), rtol=2e-6, atol=0):
        return scaled
    raise Refusal(
        f"{file} holds the tensor {FACTORS}, whose factors of the rotary frequencies are not those of Llama 3.1 to 3.3, and transformers does not "
        f"read them, so that the model would compute something else: {cure}"
    )


def _factors(config: PreTrainedConfig) -> Tensor:
    """Return the numbers by which a config's rotary frequencies of Llama 3 are smaller than plain ones."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(frequencies)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    return plain / frequencies
