"""A release is checked once against the whole recipe: its methods, and every length that the model must read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from components.lib.checks import check_finite, check_optimizers, check_release, check_speed
from components.lib.errors import Refusal
from components.lib.recipe.schema import Speed
from components.lib.stage.declaration import declared_stages
from components.lib.transformer.checkpoint import PrunableCheckpoint
from tests.components.lib.recipe.smallest import recipe
from tests.components.lib.transformer import zoo

FITS = {"calibration__length": 64, "evaluate__speed": {"prompt": 60, "generate": 4}}
"""The model reads 64 tokens."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PrunableCheckpoint:
    folder = zoo.release(zoo.SPECIMENS[0].model(layers=4), tmp_path_factory.mktemp("release"))
    return PrunableCheckpoint.open(folder)


def test_a_recipe_that_can_be_applied_passes(checkpoint: PrunableCheckpoint) -> None:
    check_release(checkpoint, recipe(**FITS))
    check_release(checkpoint, recipe(**FITS, methods={"trsp": {"ratio": 0.5}, "dress": {"ratio": 0.5}}))


@pytest.mark.parametrize("method", ["trsp", "sleb", "shortgpt"])
def test_a_method_that_leaves_no_layer_is_refused_by_its_own_field(checkpoint: PrunableCheckpoint, method: str) -> None:
    with pytest.raises(Refusal, match=rf"^methods\.{method}\.ratio 0\.9 removes 4 of the model's 4 layers"):
        check_release(checkpoint, recipe(**FITS, methods={method: {"ratio": 0.9}, "dress": {"ratio": 0.5}}))


def test_the_second_method_is_checked_too(checkpoint: PrunableCheckpoint) -> None:
    dress = {"axes": ["heads"], "ratio": 0.2}
    with pytest.raises(Refusal, match="of the axis heads no number near 20% can go"):
        check_release(checkpoint, recipe(**FITS, methods={"trsp": {"ratio": 0.5}, "dress": dress}))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"calibration__length": 65, "evaluate__length": 8}, "calibration.length"),
        ({"evaluate__length": 65}, "evaluate.length"),
        ({"evaluate__speed": {"prompt": 60, "generate": 5}}, "evaluate.speed.prompt + generate"),
    ],
)
def test_a_length_beyond_what_the_model_reads_is_refused_by_its_field(
    checkpoint: PrunableCheckpoint, changed: dict[str, object], field: str
) -> None:
    with pytest.raises(Refusal) as refused:
        check_release(checkpoint, recipe(**FITS | changed))
    assert str(refused.value) == f"{field} is 65, and the model reads 64 tokens at most: set it to 64 or less"


def test_the_length_of_a_speed_that_is_not_measured_does_not_count(checkpoint: PrunableCheckpoint) -> None:
    check_release(checkpoint, recipe(**FITS | {"evaluate__speed": {"enabled": False, "prompt": 512}}))


def test_a_missing_vllm_is_refused_if_speed_is_measured_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Speed(backend="vllm")
    with pytest.raises(
        Refusal, match=r"backend is vllm, which is not installed: name the interpreter .* in ESPALIER_VLLM_PYTHON"
    ):
        check_speed(served)
    monkeypatch.setenv("ESPALIER_VLLM_PYTHON", sys.executable)
    with pytest.raises(Refusal, match=f"not installed in the environment of {sys.executable}"):
        check_speed(served)
    check_speed(Speed())
    check_speed(served.model_copy(update={"enabled": False}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    model = zoo.SPECIMENS[0].model(layers=2).to(dtype)
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, :3] = torch.tensor(
            [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny], dtype=dtype
        )
    check_finite(PrunableCheckpoint.open(zoo.release(model, tmp_path / "whole")))
    with torch.no_grad():
        weight[-1, -1] = value
    folder = zoo.release(model, tmp_path / "broken")
    with pytest.raises(Refusal, match=r"holds NaN or infinity in model\.layers\.1\.mlp\.down_proj\.weight"):
        check_finite(PrunableCheckpoint.open(folder))


EIGHT_BITS = {"regularize__optimizer": "adamw-8bit", "recover__optimizer": "adamw-8bit", "recover__enabled": True}


@pytest.mark.parametrize(
    ("stage", "changed", "field"),
    [
        ("regularize", {}, "regularize.optimizer"),
        ("control", {"regularize__schedule": "none"}, "regularize.optimizer"),  # a control has a schedule of its own
        ("control", {"regularize__optimizer": "adamw"}, "recover.optimizer"),
        ("lora_rft", {}, "recover.optimizer"),
    ],
)
def test_states_that_cannot_be_divided_are_refused_by_their_field(
    stage: str, changed: dict[str, object], field: str
) -> None:
    with pytest.raises(Refusal) as refused:
        check_optimizers(declared_stages()[stage], recipe(**EIGHT_BITS | changed), 4, "fsdp")
    assert str(refused.value) == (
        f"{field} is adamw-8bit, and ESPALIER_PARALLEL is fsdp, which divides the states among the 4 processes of {stage}; "
        f"those of 8 bits cannot be divided: set {field} to adamw, or ESPALIER_PARALLEL to ddp"
    )


@pytest.mark.parametrize(
    ("stage", "changed", "processes", "parallel"),
    [
        ("regularize", {}, 1, "fsdp"),
        ("regularize", {}, 4, "ddp"),
        ("regularize", {}, 4, "auto"),
        ("regularize", {"regularize__schedule": "none"}, 4, "fsdp"),
        ("regularize", {"regularize__optimizer": "adamw"}, 4, "fsdp"),
        ("lora_rft", {"recover__enabled": False}, 4, "fsdp"),
        ("prune", {}, 4, "fsdp"),
    ],
)
def test_states_that_nobody_divides_may_have_8_bits(
    stage: str, changed: dict[str, object], processes: int, parallel: str
) -> None:
    check_optimizers(declared_stages()[stage], recipe(**EIGHT_BITS | changed), processes, parallel)
