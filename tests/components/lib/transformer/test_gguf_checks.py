"""What a GGUF file holds beside the model that transformers makes of it is refused by its name, but for two kinds of tensors that are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.gguf import promised, unpack
from tests.components.lib.transformer import qwen35
from tests.components.lib.transformer.test_gguf import WIDE, specimen, why_refused, write_gguf
from tests.components.lib.transformer.zoo import Specimen, logits


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    return partial(why_refused, tmp_path)


def test_heads_for_multi_token_prediction_are_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are a block beyond the model's layers; the model without them is the one that was written."""
    model = specimen("qwen3_5").model(3)
    file = write_gguf(model, tmp_path / "model.gguf", tensors=qwen35.head(model))
    assert promised(file).heads == ("blk.3.nextn.eh_proj.weight", "blk.3.attn_q.weight")
    assert promised(file).checkpoint.layers == 3
    unpack(file, tmp_path / "plain")
    torch.testing.assert_close(logits(load_model(tmp_path / "plain")), logits(model), rtol=1e-4, atol=1e-5)
    assert (
        "2 tensors of heads for multi-token prediction, such as blk.3.nextn.eh_proj.weight, are dropped" in caplog.text
    )


def llama3(**other: float) -> PreTrainedModel:
    """Make a Llama with the rotary frequencies of Llama 3.1, some of which are divided by numbers between 1 and 8."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return Specimen("llama3", "llama", {**WIDE, "head_dim": 64, "rope_parameters": rope | other}).model(2)


def rotary_factors(model: PreTrainedModel) -> Tensor:
    """Return what llama.cpp writes: by what the frequencies are divided, as its converter computes it."""
    rope = model.config.rope_parameters
    found = []
    for frequency in 1.0 / (rope["rope_theta"] ** (torch.arange(0, 64, 2).float() / 64)):
        turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        between = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        smooth = between.clamp(0, 1)
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.stack(found)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_frequencies_of_llama_3_are_recovered(factor: float, tmp_path: Path) -> None:
    """A file holds the factors alone. Those of 3.1 and 3.2 are given by settings that are known."""
    model = llama3(factor=factor)
    factors = rotary_factors(model)
    assert len({round(float(number), 3) for number in factors}) > 3  # some are between 1 and the largest
    file = write_gguf(model, tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors})
    unpack(file, tmp_path / "plain")
    plain = load_model(tmp_path / "plain")
    assert plain.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(plain), logits(model))


class TestAFileIsRefused:
    def test_with_a_setting_that_the_config_lacks(self, refused: Callable[..., str]) -> None:
        said = refused(settings={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
        assert "sets llama.rope.scaling.type to 'yarn', which transformers does not read" in said

    def test_with_a_setting_of_another_value_than_the_config(self, refused: Callable[..., str]) -> None:
        said = refused(model=specimen("gemma2").model(2), settings={"final_logit_softcapping": 20.0})
        assert "sets gemma2.final_logit_softcapping to 20.0" in said

    def test_with_a_setting_that_the_function_for_its_architecture_passes_over(
        self, refused: Callable[..., str]
    ) -> None:
        said = refused(model=specimen("qwen3_5").model(3), settings={"rope.scaling.type": "yarn"})
        assert "sets qwen35.rope.scaling.type to 'yarn', which transformers does not read" in said

    @pytest.mark.parametrize("name", ["llama", "qwen3_5"])
    def test_with_a_tensor_that_the_model_lacks(self, name: str, refused: Callable[..., str]) -> None:
        said = refused(model=specimen(name).model(3), tensors={"blk.0.attn_sinks.weight": torch.ones(4)})
        assert "holds the tensor blk.0.attn_sinks.weight, which transformers does not read" in said

    def test_with_a_second_block_for_multi_token_prediction(self, refused: Callable[..., str]) -> None:
        """transformers takes one block for such a head, and the second one for a layer."""
        model = specimen("qwen3_5").model(3)
        second = {"blk.4.nextn.eh_proj.weight": torch.ones(32, 64)}
        assert "blk.4.nextn.eh_proj.weight, which transformers does not read" in refused(
            model=model, tensors={**qwen35.head(model), **second}
        )

    @pytest.mark.parametrize("other", [{"low_freq_factor": 2.0}, {"original_max_position_embeddings": 4096}])
    def test_with_rotary_factors_that_no_llama_3_has(self, other: dict[str, Any], refused: Callable[..., str]) -> None:
        model = llama3(**other)
        said = refused(model=model, tensors={"rope_freqs.weight": rotary_factors(model)})
        assert "rope_freqs.weight, whose factors of the rotary frequencies are not those of Llama 3.1 to 3.3" in said
