"""What is known of each model family: a row of a table, and refusals for the rest.

A family is found by the exact `model_type` of its config.json. Its row says where the blocks are and which config fields
speak of single layers, each with the rule that keeps it true when layers go. A model the table does not know, or a field
that speaks of layers and is in no row, is refused by name: a cut that forgets one loads without a word and is wrong.

How to add a family: docs/families.md. Nothing here imports torch or transformers, so a refusal is immediate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from components.lib.errors import Refusal
from components.lib.transformer.layout import ATTENTION, ENDS, HEAD_NORMS, LLAMA, NORMS, SANDWICH, Layout

Config = Mapping[str, Any]
"""The mapping of a config.json."""

GONE = object()
"""What a rule returns for a field that the cut config no longer has."""

Rule = Callable[[Config, str, Sequence[int]], Any]
"""(config, field, indices of the layers that stay, ascending) → the field's value in the cut config, or GONE."""


def one_each(config: Config, field: str, kept: Sequence[int]) -> list[Any]:
    """A list with one entry a layer, such as `layer_types`."""
    return [config[field][layer] for layer in kept]


def indices(config: Config, field: str, kept: Sequence[int]) -> list[int]:
    """A list of layer indices."""
    return [new for new, old in enumerate(kept) if old in config[field]]


def leading(config: Config, field: str, kept: Sequence[int]) -> int:
    """A number of layers counted from the first, such as `max_window_layers`."""
    return sum(layer < config[field] for layer in kept)


def spelled_out(config: Config, field: str, kept: Sequence[int]) -> Any:
    """A period from which a list is made where there is none: after a cut only the list is true."""
    return GONE


def dense_layers(config: Config, field: str, kept: Sequence[int]) -> list[int]:
    """Qwen-MoE's `mlp_only_layers`: layer i is dense if it is listed, or if i + 1 is no multiple of the sparse step."""
    step = config.get("decoder_sparse_step") or 1
    return [new for new, old in enumerate(kept) if old in config[field] or (old + 1) % step]


def every_layer(config: Config, field: str, kept: Sequence[int]) -> int:
    """Qwen-MoE's `decoder_sparse_step`: 1, since `mlp_only_layers` names every dense layer of the cut model."""
    return 1


@dataclass(frozen=True)
class Family:
    """One row: the model families that share a `model_type`."""

    model_type: str
    title: str
    """The names people know it by."""
    blocks: str = "model.layers"
    """Dotted path of the blocks' `ModuleList` in the causal language model."""
    count: str = "num_hidden_layers"
    """The config field that counts the layers."""
    per_layer: Mapping[str, Rule] = field(default_factory=dict)
    """The config fields that speak of single layers, each with its rule."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Config fields that are refused when they are set, each with the reason."""
    layout: Layout | None = LLAMA
    """Where its channels lie; None if only layers can be removed."""
    layers_only: str = ""
    """Why channels cannot be removed, such as `is a mixture of experts`; empty if the layout is only not written down yet."""

    def layers(self, config: Config) -> int:
        """The number of layers the config states. Raises Refusal where it states none."""
        count = config.get(self.count)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise Refusal(
                f"config.json's {self.count} is {count!r}, but {self.title} counts its layers there: set it to the number of layers"
            )
        return count

    def block_of(self, tensor: str) -> tuple[int, int, int] | None:
        """Return the block index in a tensor's name and where its digits start and end, or None for a tensor outside the blocks.

        Checkpoints of the bare base model leave the first part of the path out (`h.0.…` for `transformer.h.0.…`).
        """
        first, rest = self.blocks.split(".", 1)
        found = re.match(rf"(?:{re.escape(first)}\.)?{re.escape(rest)}\.(\d+)\.", tensor)
        return (int(found[1]), *found.span(1)) if found else None


_TYPED = MappingProxyType({"layer_types": one_each})
_WINDOWED = MappingProxyType({"layer_types": one_each, "max_window_layers": leading})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        row.model_type: row
        for row in (
            Family("llama", "Llama 2 and 3", layout=replace(LLAMA, divides=True)),
            Family(
                "opt",
                "OPT",
                blocks="model.decoder.layers",
                layout=Layout(
                    {
                        **ATTENTION,
                        "out_proj": "hidden query",
                        "fc1": "ffn hidden",
                        "fc2": "hidden ffn",
                        "self_attn_layer_norm": "hidden",
                        "final_layer_norm": "hidden",
                        "embed_tokens": "any hidden",
                        "embed_positions": "any hidden",
                        "lm_head": "any hidden",
                    },
                    hidden=("hidden_size", "word_embed_proj_dim"),
                    ffn="ffn_dim",
                    groups=None,
                    head=None,
                ),
            ),
            Family(
                "phi",
                "Phi-1, 1.5 and 2",
                layout=Layout(
                    {
                        **ATTENTION,
                        "self_attn.dense": "hidden query",
                        "fc1": "ffn hidden",
                        "fc2": "hidden ffn",
                        "q_layernorm": "any",
                        "k_layernorm": "any",
                        "input_layernorm": "hidden",
                        "final_layernorm": "hidden",
                        **ENDS,
                    },
                    head=None,
                ),
            ),
            Family("mistral", "Mistral"),
            Family("qwen2", "Qwen2 and 2.5", per_layer=_WINDOWED),
            Family("qwen3", "Qwen3", per_layer=_WINDOWED, layout=Layout({**LLAMA.modules, **HEAD_NORMS})),
            Family(
                "gemma2",
                "Gemma 2",
                per_layer=_TYPED,
                layout=Layout({**LLAMA.modules, **SANDWICH}, divides=True, scaled_embedding=True),
            ),
            Family(
                "gemma3_text",
                "Gemma 3 (text)",
                per_layer={**_TYPED, "sliding_window_pattern": spelled_out, "_sliding_window_pattern": spelled_out},
                layout=Layout({**LLAMA.modules, **SANDWICH, **HEAD_NORMS}, divides=True, scaled_embedding=True),
            ),
            Family(
                "phi3",
                "Phi-3",
                layout=Layout(
                    {
                        "qkv_proj": "query+key+key hidden",
                        "o_proj": "hidden query",
                        "gate_up_proj": "ffn+ffn hidden",
                        "down_proj": "hidden ffn",
                        **NORMS,
                        **ENDS,
                    }
                ),
            ),
            Family(
                "gpt2",
                "GPT-2",
                blocks="transformer.h",
                count="n_layer",
                unsupported={
                    "scale_attn_by_inverse_layer_idx": "scales attention by each layer's index, and a cut renumbers the layers",
                    "add_cross_attention": "lets the blocks read an encoder",
                },
                layout=Layout(
                    {
                        "c_attn": "query+key+key hidden",
                        "attn.c_proj": "hidden query",
                        "c_fc": "ffn hidden",
                        "mlp.c_proj": "hidden ffn",
                        "ln_1": "hidden",
                        "ln_2": "hidden",
                        "ln_f": "hidden",
                        "wte": "any hidden",
                        "wpe": "any hidden",
                        "lm_head": "any hidden",
                    },
                    hidden=("n_embd",),
                    ffn="n_inner",
                    heads="n_head",
                    groups=None,
                    head=None,
                    transposed=True,
                ),
            ),
            Family(
                "gpt_neox",
                "GPT-NeoX and Pythia",
                blocks="gpt_neox.layers",
                layout=Layout(
                    {
                        "query_key_value": "qkv hidden",
                        "attention.dense": "hidden query",
                        "dense_h_to_4h": "ffn hidden",
                        "dense_4h_to_h": "hidden ffn",
                        "input_layernorm": "hidden",
                        "post_attention_layernorm": "hidden",
                        "final_layer_norm": "hidden",
                        "embed_in": "any hidden",
                        "embed_out": "any hidden",
                        "lm_head": "any hidden",
                    },
                    groups=None,
                    head=None,
                ),
            ),
            Family(
                "smollm3",
                "SmolLM3",
                per_layer={**_WINDOWED, "no_rope_layers": one_each, "no_rope_layer_interval": spelled_out},
            ),
            Family(
                "olmo2",
                "OLMo 2",
                layout=Layout({**LLAMA.modules, **SANDWICH, "q_norm": "query", "k_norm": "key"}),
            ),
            Family("granite", "Granite"),
            Family(
                "starcoder2",
                "StarCoder2",
                layout=Layout({**ATTENTION, "c_fc": "ffn hidden", "c_proj": "hidden ffn", **NORMS, **ENDS}),
            ),
            Family("stablelm", "StableLM", layout=replace(LLAMA, head=None)),
            Family(
                "qwen3_moe",
                "Qwen3-MoE",
                per_layer={**_WINDOWED, "mlp_only_layers": dense_layers, "decoder_sparse_step": every_layer},
                layout=None,
                layers_only="is a mixture of experts",
            ),
            Family("mixtral", "Mixtral", layout=None, layers_only="is a mixture of experts"),
        )
    }
)
"""Every supported family by its `model_type`."""


def family_of(config: Config, remote_code: bool = False) -> Family:
    """Return the family of a config.json.

    Raises:
        Refusal: the model is encoder-decoder, multimodal, quantised, runs code of its own without `remote_code`, is of
            an unknown family, or has a field that speaks of layers and that its row does not know.
    """
    _refuse_kinds(config, remote_code)
    family = family_named(config.get("model_type"))
    layers = family.layers(config)
    for name, reason in family.unsupported.items():
        if config.get(name):
            raise Refusal(f"config.json's {name} is {config[name]!r}, which {reason}: choose a model without it")
    for name, value, why in _speaking_of_layers(config, layers):
        if name not in family.per_layer and name != family.count:
            raise Refusal(
                f"config.json's field {name} is {_short(value)}, which {why}, and the row {family.model_type!r} of "
                "components/lib/transformer/families.py does not say how it changes with a cut: add it there (docs/families.md shows how)"
            )
    _check_lists(config, family, layers)
    return family


def family_named(model_type: object) -> Family:
    """Return the row of a `model_type`. Raises Refusal where there is none."""
    if model_type in FAMILIES:
        return FAMILIES[str(model_type)]
    raise Refusal(
        f"the model type {model_type!r} is not supported: supported are {', '.join(FAMILIES)}; docs/families.md shows how to add a family"
    )


def cut_config(config: Config, family: Family, layers: Sequence[int]) -> dict[str, Any]:
    """Return the config of the model without `layers`, every per-layer field in step.

    Args:
        config: a config with all its per-layer lists written out.
        family: its row.
        layers: indices of the layers to remove.

    Raises:
        Refusal: an index is not of this model, or no layer would stay.
    """
    kept = kept_layers(family.layers(config), layers)
    cut = dict(config)
    for name, rule in family.per_layer.items():
        if config.get(name) is None:
            continue
        value = rule(config, name, kept)
        if value is GONE:
            del cut[name]
        else:
            cut[name] = value
    cut[family.count] = len(kept)
    return cut


def kept_layers(count: int, removed: Sequence[int]) -> list[int]:
    """Return the indices of the layers that stay, ascending. Raises Refusal for an index out of range, or when none stays."""
    foreign = sorted(layer for layer in set(removed) if not 0 <= layer < count)
    if foreign:
        raise Refusal(f"the layers to remove hold {foreign}, but the model has layers 0 to {count - 1}: name those")
    if len(set(removed)) == count:
        raise Refusal(f"all {count} layers would be removed: keep at least one")
    return [layer for layer in range(count) if layer not in set(removed)]


def _refuse_kinds(config: Config, remote_code: bool) -> None:
    """Refuse the kinds of model that no row can describe, before the model type is looked at."""
    kind = config.get("model_type")
    parts = [name for name in config if name in ("text_config", "vision_config", "audio_config")]
    if parts:
        raise Refusal(
            f"the model type {kind!r} wraps a text model with others (config.json has {', '.join(parts)}): save its text model alone and name that folder"
        )
    if config.get("is_encoder_decoder"):
        raise Refusal(f"the model type {kind!r} is an encoder-decoder, and only decoders are pruned: name a decoder")
    quantised = next((name for name in ("quantization_config", "compression_config") if config.get(name)), None)
    if quantised:
        raise Refusal(
            f"config.json's {quantised} says the weights are quantised: prune the full-precision release, and quantise the result"
        )
    if config.get("auto_map") and not remote_code:
        raise Refusal(
            "config.json's auto_map names code that comes with the model, which is not run: delete auto_map from a copy of the "
            f"release to use transformers' own {kind!r}, or pass remote_code=True in Python if you trust it"
        )


# Fields of any config that name layers in words only, or that are lists of something else.
_NOT_PER_LAYER = frozenset(
    (
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layernorm_epsilon",
        "layerdrop",
        "qk_layernorm",
        "do_layer_norm_before",
        "_remove_final_layer_norm",
        "layer_norm_elementwise_affine",
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "keys_to_ignore_at_inference",
        "id2label",
        "label2id",
        "task_specific_params",
        "rope_scaling",
        "rope_parameters",
        "auto_map",
    )
)
_WORDS = re.compile(r"layer|pattern|interval|period|every_n|first_k|sparse_step")


def _speaking_of_layers(config: Config, layers: int, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted name, value, why) of every field that may speak of single layers."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key in _NOT_PER_LAYER or value is None or value is False or value in ([], {}):
            continue
        why = _speaks_of_layers(key, value, layers)
        if why:
            yield name, value, why
        elif isinstance(value, Mapping):
            yield from _speaking_of_layers(value, layers, f"{name}.")


def _speaks_of_layers(key: str, value: Any, layers: int) -> str | None:
    """Say why a field may speak of single layers, or None. It is judged by what it holds, so that next year's field is caught."""
    if isinstance(value, list) and len(value) == layers:
        return f"has as many entries as there are layers ({layers})"
    if isinstance(value, list) and all(type(entry) is int and 0 <= entry < layers for entry in value):
        return f"may be indices into the {layers} layers"
    if isinstance(value, Mapping) and all(str(entry).isdigit() and int(entry) < layers for entry in value):
        return f"is keyed by what may be indices into the {layers} layers"
    return "speaks of layers by its name" if _WORDS.search(key) else None


def _check_lists(config: Config, family: Family, layers: int) -> None:
    """Refuse a known per-layer list that is shorter than the model, or an index that is not in it."""
    for name, rule in family.per_layer.items():
        value = config.get(name)
        if rule is one_each and value is not None and (not isinstance(value, list) or len(value) < layers):
            raise Refusal(
                f"config.json's {name} is {_short(value)}, but there are {layers} layers: give it one entry a layer"
            )


def _short(value: object, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
