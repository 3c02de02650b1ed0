"""The model types of transformers that are refused, each with its reason: docs/families.md lists them.

A refusal reads "the model type 'bert' is not supported, since it <reason>". A type that is neither here nor in the table of
families is unknown to this version of transformers. Nothing here imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_ENCODER = "is an encoder with a head for language modelling, and only decoders are pruned"
_HALF = "is the decoder of an encoder-decoder, whose blocks read the encoder"
_WRAPPER = (
    "wraps a text model with models of images, sound or other inputs, in a way that no row of the wrappers describes"
)
_DRAFT = "drafts tokens for another model, whose cache it reads"
_INDEXED = "computes numbers of a layer from the layer's index, and a cut renumbers the layers"
_SHARED = "shares weights, keys or values between layers, so that a layer cannot be removed alone"
_CROSS = "has layers that read results of earlier layers beside the residual stream"
_FIRST = "has a first layer of another shape than the others, which must stay first"
_RECURRENT = "has recurrent blocks that are run otherwise than once one after the other"
_OLD = "has blocks of its own that no row of the table describes"
_NEW = "is new, and no row of the table describes its blocks yet"

_REASONS: Mapping[str, str] = {
    _ENCODER: """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm
        roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod
    """,
    _HALF: """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper musicgen
        musicgen_melody
    """,
    _WRAPPER: """
        blip blip-2 chameleon cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl_hybrid diffusion_gemma
        dots3_note emu3 ernie4_5_vl_moe evolla fast_vlm florence2 fuyu gemma3n git
        glm5_next glmga granite4_vision granite_docling hunyuan_vl idefics inkling2 inkling_mm_model instructblip
        instructblipvideo kosmos-2 kosmos-2.5 minicpm_ocr minimax_m3_vl
        mistral_large4 mllama molmo2 moshi moss_transcribe_diarize muse_glimmer muse_spark nemotron_h_omni
        perception_lm phi4_multimodal pi0 pix2struct pp_formulanet qwen2_5_omni_thinker
        qwen3_omni_moe_thinker qwen4_exp shieldgemma2 step3p7 t5gemma2 udop unlimited_ocr video_llava
        vision-encoder-decoder
    """,
    _DRAFT: "gemma4_assistant gemma4_unified_assistant",
    _INDEXED: "beam diffllama minimax",
    _SHARED: "gemma3n_text zamba zamba2",
    _CROSS: "glm_moe_dsa hy_v4 inkling2_text",
    _FIRST: "modernbert-decoder zaya",
    _RECURRENT: "blt hrm_text reformer",
    _OLD: "cpmant ctrl dbrx gpt_neo longcat_flash openai-gpt rwkv xlnet xlstm",
    _NEW: """
        cohere_compass_text deepseek_v4 dots3_note_text inkling_text minimax_m3_vl_text qwen4_exp_text
    """,
    "is written by transformers under other names than its release has, so that no other server loads the result": "kimi_k25 qianfan_ocr",
    "is the text model of a mistral3 release, which is pruned whole, and transformers does not load it alone": "mistral4",
    "is GPT-2 under an older name: set model_type to gpt2 in a copy of its config.json": "gpt-sw3",
}

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {model_type: reason for reason, types in _REASONS.items() for model_type in types.split()}
)
"""model_type → why it is refused."""
