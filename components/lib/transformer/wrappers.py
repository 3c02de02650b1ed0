"""The table of wrappers: models that put towers for images, sound or other inputs beside a text model, and a projector between them.

A wrapper is pruned in its text model alone: the row of the text model's type says how, and the wrapper's row where it lies. The other
towers and the projector travel as they are. They write the residual stream, so that it keeps its width.

Nothing here imports torch or transformers, so a refusal is immediate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from components.lib.transformer.family import Config, Family


@dataclass(frozen=True)
class Wrapper:
    """One row: the wrappers that share a `model_type`."""

    model_type: str
    title: str
    text: str
    """The text model's type if config.json does not state it."""
    tower: str = "model.language_model"
    """Dotted path of the text model in the wrapper."""
    stored: tuple[str, ...] = ()
    """The tower's paths in older checkpoints."""
    fixed: Callable[[Config, int], range] | None = None
    """(config, number of layers) → the layers that cannot be removed, beside those of the text model."""
    why_fixed: str = ""
    alone: bool = True
    """Whether the class of the text model, loaded alone, computes what it computes in the wrapper."""
    layers_only: str = ""
    """Why channels of the text model cannot be removed, if they cannot."""

    def around(self, text: Family) -> Family:
        """Return the row of the wrapper around the text model of a row."""
        inside = text.blocks.split(".", 1)[1]
        paths = tuple(f"{tower}.{inside}" for tower in (self.tower, *self.stored))
        family = replace(
            text,
            model_type=self.model_type,
            title=self.title,
            wraps=text.model_type,
            tower=self.tower,
            blocks=paths[0],
            stored=paths[1:],
            fixed=self.fixed or text.fixed,
            why_fixed=self.why_fixed or text.why_fixed,
        )
        within = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in family.patterns))
        if self.layers_only:
            return replace(family, layout=None, layers_only=self.layers_only)
        return replace(family, layout=text.layout and replace(text.layout, within=within))


def deepstack(config: Config, layers: int) -> range:
    """The first layers, behind each of which Qwen3-VL adds features of the image."""
    return range(len((config.get("vision_config") or {}).get("deepstack_visual_indexes", (8, 16, 24))))


_DEEPSTACK = "features of the image are added behind each of the first layers, by the layer's index"
_OLD = ("language_model.model",)

WRAPPERS: Mapping[str, Wrapper] = MappingProxyType(
    {
        row.model_type: row
        for row in (
            Wrapper("gemma3", "Gemma 3", "gemma3_text", stored=_OLD),
            Wrapper("qwen2_vl", "Qwen2-VL", "qwen2_vl_text", stored=("model",)),
            Wrapper("qwen2_5_vl", "Qwen2.5-VL", "qwen2_5_vl_text", stored=("model",)),
            Wrapper("qwen3_vl", "Qwen3-VL", "qwen3_vl_text", fixed=deepstack, why_fixed=_DEEPSTACK),
            Wrapper("qwen3_vl_moe", "Qwen3-VL (experts)", "qwen3_vl_moe_text", fixed=deepstack, why_fixed=_DEEPSTACK),
            Wrapper("qwen3_5", "Qwen3.5", "qwen3_5_text"),
            Wrapper("qwen3_5_moe", "Qwen3.5-MoE", "qwen3_5_moe_text"),
            Wrapper("mistral3", "Mistral 3", "mistral", stored=_OLD),
            Wrapper("smolvlm", "SmolVLM", "llama", tower="model.text_model"),
            Wrapper("idefics3", "Idefics 3", "llama", tower="model.text_model"),
            Wrapper("llama4", "Llama 4", "llama4_text", tower="language_model.model"),
            Wrapper("llava", "LLaVA", "llama", stored=_OLD),
            Wrapper("llava_next", "LLaVA-NeXT", "llama", stored=_OLD),
            Wrapper("internvl", "InternVL", "qwen2", stored=_OLD),
            Wrapper("paligemma", "PaliGemma", "gemma", stored=_OLD, alone=False),
            Wrapper("lfm2_vl", "LFM2-VL", "lfm2", stored=_OLD),
            Wrapper("cohere2_vision", "Command A Vision", "cohere2", stored=_OLD, alone=False),
            Wrapper("aya_vision", "Aya Vision", "cohere", stored=_OLD, alone=False),
            Wrapper("lfm3_vl", "LFM3-VL", "lfm3"),
            Wrapper("lighton_ocr", "LightOn OCR", "qwen3"),
            Wrapper("got_ocr2", "GOT-OCR 2", "qwen2", stored=_OLD),
            Wrapper("llava_onevision", "LLaVA-OneVision", "qwen2", stored=_OLD),
            Wrapper("exaone4_5", "EXAONE 4.5", "exaone4"),
            Wrapper("gemma4", "Gemma 4", "gemma4_text"),
            Wrapper(
                "idefics2",
                "Idefics 2",
                "mistral",
                tower="model.text_model",
                layers_only="has a projector as wide as the text model's MLP",
            ),
            Wrapper("deepseek_vl", "DeepSeek-VL", "llama"),
            Wrapper("janus", "Janus", "llama"),
            Wrapper("vipllava", "ViP-LLaVA", "llama", stored=_OLD),
            Wrapper("glm4v", "GLM-4.1V", "glm4v_text"),
            Wrapper("glm46v", "GLM-4.6V Flash", "glm4v_text"),
            Wrapper("glm4v_moe", "GLM-4.5V and 4.6V", "glm4v_moe_text"),
            Wrapper("gemma4_unified", "Gemma 4 unified", "gemma4_unified_text"),
            Wrapper("minicpmv4_6", "MiniCPM-V 4.6", "qwen3_5_text"),
            Wrapper("minicpmv4_7", "MiniCPM-V 4.7", "qwen3_5_text"),
            Wrapper("glm_ocr", "GLM-OCR", "glm_ocr_text"),
            Wrapper("paddleocr_vl", "PaddleOCR-VL", "paddleocr_vl_text", stored=("model",)),
            Wrapper("pp_chart2table", "PP-Chart2Table", "qwen2", stored=_OLD),
            Wrapper("video_llama_3", "VideoLLaMA 3", "qwen2"),
            Wrapper("aria", "Aria", "aria_text", stored=_OLD),
            Wrapper("ovis2", "Ovis 2", "qwen2"),
            Wrapper("llava_next_video", "LLaVA-NeXT-Video", "llama", stored=_OLD),
            Wrapper("hyperclovax_vision_v2", "HyperCLOVA X Vision 2", "hyperclovax"),
        )
    }
)
"""Every wrapper that is pruned, by its `model_type`."""
