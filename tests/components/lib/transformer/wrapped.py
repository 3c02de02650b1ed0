"""Tiny random wrappers: a text model with a vision tower and a projector, and a prompt with an image for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from components.lib.transformer.families import row_of
from components.lib.transformer.family import Family
from tests.components.lib.transformer.zoo import EXPERTS, LATENT, LINEAR, ROUTED, VOCABULARY, WINDOW

IMAGE, START, END, VIDEO = 90, 91, 92, 93
"""The tokens that stand for a patch of an image, for its begin and end, and for a patch of a video."""

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
DEPTH = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 1,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
GLM_TOKENS = {
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def pixels(*shape: int) -> Callable[[], dict[str, Tensor]]:
    """Return a function that draws the pixels of an image in a shape."""
    return lambda: {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(2))}


def patches() -> dict[str, Tensor]:
    """The pixels of four by four patches, as Qwen's processors give them."""
    return pixels(16, 48)() | {"image_grid_thw": torch.tensor([[1, 4, 4]])}


@dataclass(frozen=True)
class Wrapped:
    """One shape of a wrapper."""

    model_type: str
    image: Callable[[], dict[str, Any]]
    """What the wrapper's processor gives for an image."""
    length: int
    """Tokens that stand for the image."""
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=lambda: VISION)
    settings: Mapping[str, Any] = field(default_factory=dict)
    text_type: str | None = None

    def __str__(self) -> str:
        return self.model_type

    @property
    def family(self) -> Family:
        """The row of the text model in the wrapper."""
        return row_of(self.model_type, self.text_type)

    def model(self, layers: int = 6, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Make the model, every parameter random."""
        text = {**TEXT, "num_hidden_layers": layers, **self.text}
        if self.text_type:
            text["model_type"] = self.text_type
        config = AutoConfig.for_model(
            self.model_type,
            text_config=text,
            vision_config=dict(self.vision),
            **{"image_token_id": IMAGE, **self.settings},
        )
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = parameter.data + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise
        model.tie_weights()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model.eval()

    def prompt(self) -> dict[str, Any]:
        """Return a prompt of words, an image, and words: the inputs of `forward`."""
        words = torch.randint(3, 80, (12,), generator=torch.Generator().manual_seed(1)).tolist()
        tokens = [*words[:5], START, *[IMAGE] * self.length, END, *words[5:]]
        kinds = torch.tensor([[int(token == IMAGE) for token in tokens]])
        found = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens)).long()}
        return (
            found
            | self.image()
            | ({"mm_token_type_ids": kinds} if {"image_grid_thw", "target_sizes"} & self.image().keys() else {})
        )


MIXED = ["sliding_attention", "full_attention"] * 3

WRAPPED = (
    Wrapped(
        "gemma3",
        pixels(1, 3, 16, 16),
        4,
        text={**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": MIXED},
        settings={"mm_tokens_per_image": 4},
    ),
    Wrapped(
        "qwen2_vl",
        patches,
        4,
        text={"rope_parameters": SECTIONS},
        vision={**DEPTH, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        settings=TOKENS,
    ),
    Wrapped(
        "qwen2_5_vl",
        patches,
        4,
        text={"rope_parameters": SECTIONS},
        vision={**DEPTH, "window_size": 8, "fullatt_block_indexes": [1]},
        settings=TOKENS,
    ),
    Wrapped(
        "qwen3_vl",
        patches,
        4,
        text={"rope_parameters": SECTIONS, "head_dim": 8},
        vision={**DEPTH, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        settings=TOKENS,
    ),
    Wrapped(
        "qwen3_vl_moe",
        patches,
        4,
        text={"rope_parameters": SECTIONS, "head_dim": 8, "num_experts": 4, **EXPERTS},
        vision={**DEPTH, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        settings=TOKENS,
    ),
    Wrapped(
        "qwen3_5",
        patches,
        4,
        text={**LINEAR, "head_dim": 8, "rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}},
        vision={**DEPTH, "num_position_embeddings": 16},
        settings=TOKENS,
    ),
    Wrapped(
        "qwen3_5_moe",
        patches,
        4,
        text={
            **LINEAR,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "head_dim": 8,
            "rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0},
        },
        vision={**DEPTH, "num_position_embeddings": 16},
        settings=TOKENS,
    ),
    Wrapped(
        "mistral3",
        lambda: pixels(1, 3, 16, 16)() | {"image_sizes": torch.tensor([[16, 16]])},
        4,
        text={"head_dim": 8},
        vision={**VISION, "model_type": "pixtral", "head_dim": 8, "hidden_act": "gelu"},
        text_type="mistral",
    ),
    Wrapped("smolvlm", pixels(1, 1, 3, 16, 16), 4, vision=VISION, settings={"scale_factor": 2}, text_type="llama"),
    Wrapped("idefics3", pixels(1, 1, 3, 16, 16), 4, settings={"scale_factor": 2}, text_type="llama"),
    Wrapped(
        "llama4",
        pixels(1, 3, 16, 16),
        4,
        text={
            "num_local_experts": 4,
            "intermediate_size_mlp": 24,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 8,
        },
        vision={
            **VISION,
            "intermediate_size": 64,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
        settings={"image_token_index": IMAGE},
    ),
    Wrapped(
        "llava",
        pixels(1, 3, 16, 16),
        16,
        vision={**VISION, "model_type": "clip_vision_model"},
        settings={"image_token_index": IMAGE},
        text_type="llama",
    ),
    Wrapped(
        "internvl",
        pixels(1, 3, 16, 16),
        4,
        vision={**VISION, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        text_type="qwen2",
    ),
    Wrapped(
        "paligemma",
        pixels(1, 3, 16, 16),
        16,
        text={"head_dim": 8},
        vision={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
        settings={"image_token_index": IMAGE, "projection_dim": 32},
        text_type="gemma",
    ),
    Wrapped(
        "cohere2_vision",
        pixels(1, 3, 16, 16),
        4,
        text={**WINDOW, "layer_types": MIXED},
        vision={**VISION, "model_type": "siglip_vision_model"},
        settings={"downsample_factor": 2, "alignment_intermediate_size": 32},
        text_type="cohere2",
    ),
    Wrapped(
        "aya_vision",
        pixels(1, 3, 16, 16),
        4,
        vision={**VISION, "model_type": "siglip_vision_model"},
        settings={"downsample_factor": 2, "adapter_layer_norm_eps": 1e-6, "image_token_index": IMAGE},
        text_type="cohere",
    ),
    Wrapped(
        "llava_next",
        lambda: pixels(1, 2, 3, 16, 16)() | {"image_sizes": torch.tensor([[16, 16]])},
        16 + 20,
        vision={**VISION, "model_type": "clip_vision_model"},
        settings={"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]]},
        text_type="llama",
    ),
    Wrapped(
        "lfm2_vl",
        lambda: (
            pixels(1, 16, 48)()
            | {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16).long()}
        ),
        4,
        text={"full_attn_idxs": [1, 4]},
        vision={**VISION, "model_type": "siglip2_vision_model", "num_patches": 16},
        settings={"downsample_factor": 2, "projector_hidden_size": 32},
        text_type="lfm2",
    ),
    Wrapped(
        "lfm3_vl",
        patches,
        4,
        text={**WINDOW, "head_dim": 8, "layer_types": ["conv", "full_attention"] * 3},
        vision={
            **DEPTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "full_attention"],
        },
        settings={**TOKENS, "projector_hidden_size": 32},
        text_type="lfm3",
    ),
    Wrapped(
        "lighton_ocr",
        lambda: pixels(1, 3, 16, 16)() | {"image_sizes": torch.tensor([[16, 16]])},
        4,
        text={"head_dim": 8},
        vision={**VISION, "model_type": "pixtral", "head_dim": 8, "hidden_act": "gelu"},
        text_type="qwen3",
    ),
    *(
        Wrapped(
            name,
            pixels(1, 3, 64, 64),
            16,
            vision={
                **VISION,
                "output_channels": 8,
                "image_size": 64,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 24,
            },
            settings={"image_token_index": IMAGE},
            text_type="qwen2",
        )
        for name in ("got_ocr2", "pp_chart2table")
    ),
    Wrapped(
        "llava_onevision",
        lambda: pixels(1, 2, 3, 16, 16)() | {"image_sizes": torch.tensor([[16, 16]])},
        36,
        vision={**VISION, "model_type": "siglip_vision_model"},
        settings={"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]]},
        text_type="qwen2",
    ),
    Wrapped(
        "exaone4_5",
        patches,
        4,
        text={**WINDOW, "sliding_window_pattern": 3},
        vision={**DEPTH, "window_size": 8, "fullatt_block_indexes": [1], "num_key_value_heads": 2},
        settings=TOKENS,
        text_type="exaone4",
    ),
    Wrapped(
        "gemma4",
        lambda: (
            pixels(1, 16, 48)() | {"image_position_ids": torch.tensor([[[x, y] for y in range(4) for x in range(4)]])}
        ),
        4,
        text={**WINDOW, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "layer_types": MIXED},
        vision={
            **VISION,
            "model_type": "gemma4_vision",
            "head_dim": 8,
            "global_head_dim": 8,
            "num_key_value_heads": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "default_output_length": 4,
        },
        text_type="gemma4_text",
    ),
    Wrapped(
        "idefics2",
        pixels(1, 1, 3, 16, 16),
        4,
        settings={
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
                "hidden_size": 32,
            }
        },
        text_type="mistral",
    ),
    Wrapped(
        "janus",
        pixels(1, 3, 16, 16),
        16,
        vision={**VISION, "num_image_tokens": 16, "projection_dim": 32},
        text_type="llama",
    ),
    Wrapped(
        "vipllava",
        pixels(1, 3, 16, 16),
        16,
        vision={**VISION, "model_type": "clip_vision_model"},
        settings={"image_token_index": IMAGE, "vision_feature_layers": [-1, 1]},
        text_type="llama",
    ),
    Wrapped(
        "hyperclovax_vision_v2",
        patches,
        4,
        vision={**DEPTH, "window_size": 8, "fullatt_block_indexes": [1]},
        settings=TOKENS,
        text_type="hyperclovax",
    ),
    Wrapped("deepseek_vl", pixels(1, 3, 16, 16), 16, text_type="llama"),
    Wrapped(
        "mistral3",
        lambda: pixels(1, 3, 16, 16)() | {"image_sizes": torch.tensor([[16, 16]])},
        4,
        text={**ROUTED, **LATENT, "first_k_dense_replace": 2},
        vision={**VISION, "model_type": "pixtral", "head_dim": 8, "hidden_act": "gelu"},
        text_type="mistral4",
    ),
    *(
        Wrapped(
            name,
            patches,
            4,
            text={"rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}, **text},
            vision={**DEPTH, "image_size": 16},
            settings=GLM_TOKENS,
        )
        for name, text in (
            ("glm4v", {}),
            ("glm46v", {"model_type": "glm4v_text"}),
            ("glm_ocr", {"head_dim": 8}),
            ("glm4v_moe", {**ROUTED, "head_dim": 8, "first_k_dense_replace": 2}),
        )
    ),
    Wrapped(
        "gemma4_unified",
        lambda: pixels(1, 4, 192)() | {"image_position_ids": torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])},
        4,
        text={**WINDOW, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "layer_types": MIXED},
        vision={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 16,
            "mm_posemb_size": 16,
            "output_proj_dims": 16,
        },
        text_type="gemma4_unified_text",
    ),
    *(
        Wrapped(
            name,
            lambda: pixels(1, 3, 4, 256)() | {"target_sizes": torch.tensor([[8, 8]])},
            4,
            text={**LINEAR, "head_dim": 8},
            vision={**VISION, "image_size": 32, "insert_layer_id": 0},
            settings={"insert_layer_id": 0},
            text_type="qwen3_5_text",
        )
        for name in ("minicpmv4_6", "minicpmv4_7")
    ),
    Wrapped(
        "paddleocr_vl",
        lambda: pixels(16, 3, 4, 4)() | {"image_grid_thw": torch.tensor([[1, 4, 4]])},
        4,
        text={"head_dim": 8, "rope_parameters": SECTIONS},
        settings=TOKENS,
    ),
    Wrapped(
        "video_llama_3",
        lambda: patches() | {"image_merge_sizes": torch.tensor([2])},
        4,
        text_type="qwen2",
    ),
    Wrapped(
        "aria",
        pixels(1, 3, 16, 16),
        4,
        text={"moe_num_experts": 4, "moe_topk": 2},
        vision={**VISION, "model_type": "idefics3_vision"},
        settings={"image_token_index": IMAGE, "projector_patch_to_query_dict": {16: 4}},
        text_type="aria_text",
    ),
    Wrapped(
        "ovis2",
        pixels(1, 3, 16, 16),
        16,
        vision={**VISION, "vocab_size": 24},
        settings={
            "visual_indicator_token_ids": [START, END, 85, 86, 87],
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
        },
        text_type="qwen2",
    ),
    Wrapped(
        "llava_next_video",
        lambda: pixels(1, 2, 3, 16, 16)() | {"image_sizes": torch.tensor([[16, 16]])},
        36,
        vision={**VISION, "model_type": "clip_vision_model"},
        settings={"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]]},
        text_type="llama",
    ),
)
