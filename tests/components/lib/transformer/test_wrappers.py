"""The contract of wrappers: the text model is cut, and an image is answered as by the dense wrapper without the layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from components.lib.errors import Refusal
from components.lib.recipe.training import Lora, Regularize
from components.lib.training.lora import adapted
from components.lib.training.regularize import regularize
from components.lib.transformer.channels import channels_to_remove, check_channels
from components.lib.transformer.checkpoint import WEIGHTS, PrunableCheckpoint, load_model
from components.lib.transformer.export import save_model, verify_cut
from components.lib.transformer.families import FAMILIES, TOWERS
from components.lib.transformer.gates import bypassed, family_in, removable, skipped
from components.lib.transformer.narrow import mixtures, narrowed
from components.lib.transformer.selection import Channels, Selection
from components.lib.transformer.surgery import cut_checkpoint, drop_layers, text_alone, write
from components.lib.transformer.wrappers import WRAPPERS
from tests.components.lib.transformer.test_contract_core import assert_same_files
from tests.components.lib.transformer.wrapped import WRAPPED, Wrapped
from tests.components.lib.transformer.zoo import release

LAYERS = 6


@pytest.fixture(scope="module", params=WRAPPED, ids=str)
def wrapped(request: pytest.FixtureRequest) -> Wrapped:
    return request.param


def named(model_type: str) -> Wrapped:
    return next(one for one in WRAPPED if one.model_type == model_type)


def released(wrapped: Wrapped, folder: Path) -> Path:
    """Save the wrapper as a release would be, its processor's settings included."""
    (release(wrapped.model(LAYERS), folder) / "preprocessor_config.json").write_text('{"do_resize": true}\n')
    return folder


@torch.no_grad()
def seen(model: PreTrainedModel, wrapped: Wrapped, **changed: Any) -> Tensor:
    """The logits of the prompt with an image."""
    return model(**wrapped.prompt() | changed, use_cache=False).logits


def test_every_wrapper_has_a_specimen_and_a_row_of_its_text_model() -> None:
    assert {one.model_type for one in WRAPPED} == set(WRAPPERS)
    assert all(wrapper.text in FAMILIES or wrapper.text in TOWERS for wrapper in WRAPPERS.values())


def test_a_cut_answers_an_image_as_the_wrapper_without_the_layers(wrapped: Wrapped, tmp_path: Path) -> None:
    """On disk and in memory, bit for bit; with the text alone, verified as any other cut."""
    source = released(wrapped, tmp_path / "release")
    model = load_model(source)
    free = removable(model)
    removed = (free[0], free[2])
    plain = seen(model, wrapped)
    assert not torch.equal(seen(model, wrapped, pixel_values=-wrapped.image()["pixel_values"]), plain)
    with skipped(model, removed):
        expected = seen(model, wrapped)
    with bypassed(model, removed):
        assert torch.equal(seen(model, wrapped), expected)
    assert (plain - expected).abs().max() > 0.1

    cut_checkpoint(source, tmp_path / "cut", removed)
    assert verify_cut(source, tmp_path / "cut", removed).max_difference == 0
    loaded, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(seen(loaded.eval(), wrapped), expected)

    drop_layers(model, removed)
    assert torch.equal(seen(model, wrapped), expected)
    save_model(model, source, tmp_path / "saved", removed=removed)
    assert_same_files(tmp_path / "saved", tmp_path / "cut")


def test_the_other_towers_and_the_processor_travel_as_they_are(tmp_path: Path) -> None:
    wrapped = named("gemma3")
    source = released(wrapped, tmp_path / "release")
    cut_checkpoint(source, tmp_path / "cut", (1,))
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "cut" / WEIGHTS)
    family = PrunableCheckpoint.open(source).family
    others = [name for name in before if not family.block_of(name)]
    assert any("vision" in name for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (source / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == len(config["text_config"]["layer_types"]) == LAYERS - 1
    assert config["vision_config"] == json.loads((source / "config.json").read_text())["vision_config"]


NARROW = [one for one in WRAPPED if one.family.layout]


@pytest.mark.parametrize("wrapped", NARROW, ids=str, indirect=True)
def test_the_text_model_loses_channels_that_the_projector_does_not_write(wrapped: Wrapped, tmp_path: Path) -> None:
    source = released(wrapped, tmp_path / "release")
    model, checkpoint = load_model(source), PrunableCheckpoint.open(source)
    layout = checkpoint.family.layout
    assert layout
    axes = ("ffn", "heads") if layout.head else ("ffn",)
    try:
        removed = channels_to_remove(checkpoint.family, checkpoint.config, dict.fromkeys(axes, 0.5), None)
    except Refusal:  # the config class wants a hidden width that is a multiple of the heads
        removed = channels_to_remove(checkpoint.family, checkpoint.config, {"ffn": 0.5}, None)
    check_channels(checkpoint, dict.fromkeys(removed, 0.5), None)
    channels = Channels(**{axis: [range(count)] * LAYERS for axis, count in removed.items()})
    with narrowed(model, channels):
        expected = seen(model, wrapped)
    cut_checkpoint(source, tmp_path / "cut", channels=channels)
    verify_cut(source, tmp_path / "cut", channels=channels)
    found = seen(load_model(tmp_path / "cut"), wrapped)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(Refusal, match=r"the projector of the other towers writes them: name ffn"):
        channels_to_remove(checkpoint.family, checkpoint.config, {"hidden": 0.5}, None)


@pytest.mark.parametrize("wrapped", [one for one in WRAPPED if one.family.experts], ids=str, indirect=True)
def test_the_text_model_loses_experts(wrapped: Wrapped, tmp_path: Path) -> None:
    """For an image too. To rounding: a processor may sum the product of a router with fewer rows in another order."""
    source = released(wrapped, tmp_path / "release")
    model, checkpoint = load_model(source), PrunableCheckpoint.open(source)
    check_channels(checkpoint, {"experts": 0.5}, None)
    channels = Channels(experts=[(0, 2) if layer in mixtures(model) else () for layer in range(LAYERS)])
    plain = seen(model, wrapped)
    with narrowed(model, channels):
        expected = seen(model, wrapped)
    assert (plain - expected).abs().max() > 0.01
    cut_checkpoint(source, tmp_path / "cut", channels=channels)
    verify_cut(source, tmp_path / "cut", channels=channels)
    found = seen(load_model(tmp_path / "cut"), wrapped)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_layers_behind_which_the_image_is_added_stay(tmp_path: Path) -> None:
    source = released(named("qwen3_vl"), tmp_path / "release")
    assert removable(load_model(source)) == [2, 3, 4, 5]
    with pytest.raises(Refusal, match=r"layer 1 of Qwen3-VL cannot be removed, since features of the image are added"):
        cut_checkpoint(source, tmp_path / "cut", (1, 4))


def test_a_config_may_state_the_text_model_s_fields_beside_the_wrapper_s(tmp_path: Path) -> None:
    """As the releases of Qwen2.5-VL do; their tensors have the names of a model of text alone."""
    wrapped = named("qwen2_5_vl")
    source = released(wrapped, tmp_path / "release")
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    (source / "config.json").write_text(json.dumps(text | config))
    tensors = load_file(source / WEIGHTS)
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    save_file(older, source / WEIGHTS, metadata={"format": "pt"})
    with skipped(model := load_model(source), (0, 3)):
        expected = seen(model, wrapped)
    cut_checkpoint(source, tmp_path / "cut", (0, 3))
    verify_cut(source, tmp_path / "cut", (0, 3))
    assert torch.equal(seen(load_model(tmp_path / "cut"), wrapped), expected)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == LAYERS - 2


def test_a_config_may_leave_widths_to_its_class(tmp_path: Path) -> None:
    """As the releases of Gemma 3 do; their tensors have older names."""
    wrapped = named("gemma3")
    source = released(wrapped, tmp_path / "release")
    config = json.loads((source / "config.json").read_text())
    del config["text_config"]["num_key_value_heads"]
    heads = json.loads(json.dumps(config))
    (source / "config.json").write_text(json.dumps(heads))
    assert PrunableCheckpoint.open(source).config["text_config"]["num_key_value_heads"] == 4
    tensors = load_file(source / WEIGHTS)
    older = {name.replace("model.language_model.", "language_model.model."): tensor for name, tensor in tensors.items()}
    save_file(older, source / WEIGHTS, metadata={"format": "pt"})
    assert PrunableCheckpoint.open(source).layers == LAYERS


ALONE = [one for one in WRAPPED if one.family.wraps in FAMILIES and WRAPPERS[one.model_type].alone]


@pytest.mark.parametrize("wrapped", ALONE, ids=str, indirect=True)
def test_the_text_model_taken_out_computes_what_it_computes_in_the_wrapper(wrapped: Wrapped, tmp_path: Path) -> None:
    source = released(wrapped, tmp_path / "release")
    write(text_alone(PrunableCheckpoint.open(source)), tmp_path / "text")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(loading.values()), loading
    assert PrunableCheckpoint.open(tmp_path / "text").family is FAMILIES[wrapped.family.wraps]
    # Words alone: some wrappers read the tokens that stand for an image as padding.
    words = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=words).logits, load_model(source)(input_ids=words).logits)
    assert not list((tmp_path / "text").glob("*processor_config.json"))


def test_a_text_model_without_a_class_of_its_own_is_not_taken_out(tmp_path: Path) -> None:
    source = released(named("qwen2_5_vl"), tmp_path / "release")
    with pytest.raises(
        Refusal, match=r"text_only is true, but transformers has no class for the text model of Qwen2\.5-VL"
    ):
        write(text_alone(PrunableCheckpoint.open(source)), tmp_path / "text")


def test_training_changes_the_text_model_alone() -> None:
    model = named("gemma3").model(LAYERS)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    windows = torch.randint(3, 80, (4, 12), generator=torch.Generator().manual_seed(0))
    settings = Regularize(steps=2, batch_size=2, learning_rate=1e-2, schedule="anneal")
    regularize(model, copy.deepcopy(model), windows, Selection(removed=(1,)), settings)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("vision" not in name and "projector" not in name for name in changed)


def test_adapters_are_added_to_the_text_model_alone() -> None:
    model = named("gemma3").model(LAYERS)
    trained = adapted(model, Lora(rank=2), seed=0)
    assert isinstance(trained, PeftModel)
    names = [name for name, weight in trained.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * 7 * LAYERS
    assert all(family_in(model).block_of(name.removeprefix("base_model.model.")) for name in names)


def test_a_wrapper_of_an_unknown_text_model_is_refused_by_the_text_model_s_name(tmp_path: Path) -> None:
    source = released(named("llava"), tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["model_type"] = "zamba2"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="the model type 'zamba2' is not supported, since it shares weights"):
        PrunableCheckpoint.open(source)
