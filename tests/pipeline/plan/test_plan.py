"""A run that a device cannot hold is refused before it starts, and the refusal names settings with which it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.training import Objective
from components.lib.store.store import Store
from pipeline.kubeflow.profile import Profile
from pipeline.plan import plan
from pipeline.plan.fake import Kind
from pipeline.plan.plan import Device, device_of, require_memory, rough, shape_of
from pipeline.plan.stages import Shape, needs
from tests.components.lib.transformer.test_gguf import specimen, write_gguf
from tests.pipeline.plan.shapes import TINY
from tests.pipeline.plan.test_stages import recipe


def profile(**stage: object) -> Profile:
    fields = {"environment": {"ESPALIER_BUCKET": "b"}, "stages": {"regularize": stage}}
    return Profile.model_validate(fields)


def test_a_gpu_s_size_is_read_from_its_name() -> None:
    named = profile(gpu={}, node_selector={"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"})
    assert device_of(named, "regularize") == Device("cuda", 79 * 2**30, "the profile's NVIDIA-A100-SXM4-80GB")
    assert device_of(profile(gpu={}), "regularize").size is None


def test_several_gpus_divide_a_training_and_nothing_else() -> None:
    several = device_of(profile(gpu={"count": 4}), "regularize")
    asked = recipe("regularize.micro_batch_size=2", "regularize.transfer=ridge")
    found = {
        need.stage: need for need in needs(asked, Shape(TINY, "bfloat16"), "cuda", only=["regularize", "evaluate"])
    }
    (trained,) = found["regularize"].trained
    held = trained.weights + trained.gradients + trained.optimizer + trained.teacher
    assert several.takes(found["regularize"]) == max(
        found["regularize"].transferred,
        round(held / 4 + trained.logits + trained.activations + 2 * found["regularize"].block),
    )
    assert several.takes(found["evaluate"]) == found["evaluate"].peak.total
    whole = profile(gpu={"count": 4}).model_copy(update={"environment": {"ESPALIER_PARALLEL": "ddp"}})
    assert device_of(whole, "regularize").takes(found["regularize"]) == found["regularize"].peak.total


def test_the_gpus_of_all_nodes_divide_a_training() -> None:
    asked, shape = recipe("regularize.batch_size=16"), Shape(TINY, "bfloat16")
    (need,) = needs(asked, shape, "cuda", only=["regularize"])
    one, two = (device_of(profile(gpu={"count": 4}, nodes=nodes), "regularize") for nodes in (1, 2))
    assert (one.count, two.count) == (4, 8)
    (trained,) = need.trained
    held = trained.weights + trained.gradients + trained.optimizer + trained.teacher
    # A block is gathered whole on each, beside the one before it, and 16 windows become 2.
    assert two.takes(need) == round(held / 8 + (trained.logits + trained.activations) / 8 + 2 * need.block)
    assert two.takes(need) < one.takes(need)
    assert device_of(profile(gpu={}, nodes=3), "regularize").count == 3
    assert device_of(profile(gpu={"count": 4}, nodes=2), "learn-gates").count == 1


def test_states_of_8_bits_are_not_divided() -> None:
    (need,) = needs(recipe("regularize.optimizer=adamw-8bit"), Shape(TINY, "bfloat16"), "cuda", only=["regularize"])
    assert device_of(profile(gpu={"count": 4}), "regularize").takes(need) == need.peak.total


def test_a_processor_has_the_stage_s_memory() -> None:
    assert device_of(profile(memory="4Gi"), "regularize").size == 3 * 2**30
    assert device_of(profile(memory="4G"), "regularize").size == 4 * 10**9 - 2**30


def test_a_config_on_s3_is_enough(store: Store) -> None:
    store.write_text("somewhere/config.json", json.dumps(TINY | {"dtype": "bfloat16"}))
    assert shape_of(store.uri("somewhere")) == Shape(TINY | {"dtype": "bfloat16"}, "bfloat16")
    with pytest.raises(Refusal, match="nowhere has no config"):
        shape_of(store.uri("nowhere"))


def test_a_gguf_file_is_in_memory_as_a_whole_when_it_is_pinned(tmp_path: Path) -> None:
    """A folder of tensors is copied piece by piece."""
    shape = shape_of(str(write_gguf(specimen("llama").model(2), tmp_path / "model.gguf", quantised=True)))
    (pin,) = needs(recipe(), shape, "cpu", only=["pin"])
    assert pin.peak.total == shape.bytes > 0
    (pin,) = needs(recipe(), Shape(TINY, "bfloat16"), "cpu", only=["pin"])
    assert pin.peak.total == 0


def test_the_rough_bound_is_above_every_stage() -> None:
    asked = recipe("evaluate.controls=[dense-trained]", "calibration.length=64")
    assert rough(asked, TINY) > max(need.peak.total for need in needs(asked, Shape(TINY, "bfloat16"), "cpu"))


def test_a_device_that_is_too_small_is_refused_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(TINY, "bfloat16")
    (need,) = needs(recipe(), shape, "cuda", only=["regularize"])
    small = need.peak.total - 1
    monkeypatch.setattr(plan, "shape_of", lambda release: shape)
    monkeypatch.setattr(plan, "here", lambda: Device("cuda", small, "this machine"))
    with pytest.raises(Refusal, match=r"^regularize takes .* and this machine has ") as refused:
        list(require_memory(recipe(), str(tmp_path)))
    settings = [word for word in str(refused.value).split() if word.startswith("regularize.")]
    assert settings == ["regularize.micro_batch_size=1"]
    (cured,) = needs(recipe(*settings), shape, "cuda", only=["regularize"])
    assert cured.peak.total <= small


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        # States that are elsewhere need not be small.
        ("cuda", {}, ["offload_optimizer=true", "teacher_top=1024", "precision=bf16"]),
        # On a processor the states are not elsewhere; without a teacher nothing of it can be kept.
        ("cpu", {"objective": Objective(lm=1, kl=0, state=0)}, ["precision=bf16", "optimizer=adamw-8bit"]),
    ],
    ids=["cuda", "cpu"],
)
def test_a_cure_names_only_settings_that_save_memory_there(
    kind: Kind, fields: dict[str, Any], named: list[str]
) -> None:
    fields = {"micro_batch_size": 1, "gradient_checkpointing": True, **fields}
    asked, shape = recipe("calibration.length=8"), Shape(TINY, "bfloat16")
    asked = asked.model_copy(update={"regularize": asked.regularize.model_copy(update=fields)})
    (need,) = needs(asked, shape, kind, only=["regularize"])
    said = plan.cure(asked, shape, need, Device(kind, 1, "this machine"))
    settings = [word.removeprefix("regularize.") for word in said.split() if word.startswith("regularize.")]
    assert [one for one in named if one in settings] == named
    assert set(settings) <= {*named, "trainable=lora"}


def test_a_device_of_unknown_size_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "shape_of", lambda release: Shape(TINY, "bfloat16"))
    said = list(require_memory(recipe(), str(tmp_path), profile(gpu={})))
    assert any(
        one.startswith("regularize takes 0.0 GB, and the profile's nvidia.com/gpu states no size") for one in said
    )


def test_a_release_that_is_small_beside_the_device_is_not_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "shape_of", lambda release: Shape(TINY, "bfloat16"))
    monkeypatch.setattr("pipeline.plan.stages.needs", lambda *_, **__: pytest.fail("planned"))
    assert list(require_memory(recipe(), str(tmp_path))) == []


def test_a_plan_that_fails_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "shape_of", lambda release: Shape(TINY | {"num_attention_heads": 5}, "bfloat16"))
    (said,) = require_memory(recipe(), str(tmp_path), profile(gpu={}))
    assert said.startswith("the memory of the stages is not known")
