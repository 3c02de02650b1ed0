"""Prune&Comp's scale: the ratio of magnitudes, and what keeps the model exact when its stream is scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.lib.errors import Refusal
from components.lib.training.journal import Silent
from components.lib.training.scale import scale_stream
from components.lib.transfers.scale import Scale
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import skipped, watched
from components.lib.transformer.selection import Selection
from tests.components.lib.transformer.zoo import MODERN, NARROWABLE, SPECIMENS, Specimen, logits, prompts, release

BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *MODERN)}
SCALABLE = [
    specimen
    for specimen in (*NARROWABLE, *MODERN)
    if (layout := FAMILIES[specimen.model_type].layout) and not layout.norms_after(specimen.model().config.to_dict())
]
LAYERS = 6


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("specimen", SCALABLE, ids=str)
def test_a_stream_that_is_scaled_as_a_whole_leaves_the_logits(specimen: Specimen, tied: bool) -> None:
    if tied and not specimen.ties:
        pytest.skip("the family has no tied form")
    model = specimen.model(LAYERS, tied=tied, dtype=torch.float64)
    for module in model.modules():
        for epsilon in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, epsilon, None), float):
                setattr(module, epsilon, 1e-14)  # a factor changes a norm's ε, and nothing else
    expected = logits(model, padding=(0, 0))
    scale_stream(model, LAYERS, 1.7)
    found = logits(model, padding=(0, 0))
    # Norms compute in float32.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("specimen", SCALABLE, ids=str)
def test_the_stream_before_the_run_is_scaled_to_its_magnitude_behind_it(specimen: Specimen) -> None:
    model = specimen.model(LAYERS)
    tokens, _ = prompts(padding=(0, 0))
    with watched(model, [1, 2]) as seen, torch.no_grad():
        model(input_ids=tokens)
        before, behind = seen[1][0].clone(), seen[2][1].clone()
    ratio = (behind.abs().mean(1) / before.abs().mean(1)).mean()
    Scale().apply(model, tokens, Selection(method="hand", removed=(1, 2)), journal=Silent())
    with watched(model, [1]) as seen, torch.no_grad():
        model(input_ids=tokens)
        assert torch.allclose(seen[1][0], ratio * before, rtol=1e-2, atol=1e-3 * before.abs().max())


def test_removed_layers_and_those_behind_stay_byte_for_byte() -> None:
    model = BY_NAME["llama"].model(LAYERS, tied=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    Scale().apply(model, prompts()[0], Selection(method="hand", removed=(1,)), journal=Silent())
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    }


def test_scaling_lowers_the_error_where_layers_only_scale_the_stream() -> None:
    """Layer 1 doubles the stream but for rounding: without it, scaled by 2, the model computes the same."""
    model = BY_NAME["llama"].model(LAYERS, tied=True)

    def double(block: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return 2 * inputs[0]

    handle = model.model.layers[1].register_forward_hook(double)
    expected = logits(model, padding=(0, 0))
    Scale().apply(model, prompts(padding=(0, 0))[0], Selection(method="hand", removed=(1,)), journal=Silent())
    handle.remove()
    with skipped(model, [1]):
        assert torch.allclose(logits(model, padding=(0, 0)), expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "glm4", "opt-post-norm", "mixtral"])
def test_refuses_a_family_that_it_does_not_hold_for(name: str, tmp_path: Path) -> None:
    checkpoint = PrunableCheckpoint.open(release(BY_NAME[name].model(2), tmp_path))
    with pytest.raises(Refusal, match=rf"regularize.transfer is scale, but {checkpoint.family.title.split()[0]}"):
        Scale().check(checkpoint)


def test_takes_a_family_that_it_holds_for(tmp_path: Path) -> None:
    Scale().check(PrunableCheckpoint.open(release(BY_NAME["llama"].model(2), tmp_path)))
