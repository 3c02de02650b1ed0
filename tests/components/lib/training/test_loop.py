"""The one training loop: what each step sees, how it is taken up, and when it stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from components.lib.errors import Refusal
from components.lib.recipe.training import Optimisation
from components.lib.training import loop, micro
from components.lib.training.journal import NoCheckpoints, Silent
from components.lib.training.loop import learning_rate, train, with_learning_rate
from components.lib.training.objective import lm_loss
from components.lib.transformer.gates import gated
from tests.components.lib.training.tiny import Kept, Killed, Written, counting, llama, same, weights


@contextmanager
def lm(model: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
    yield {"loss": lm_loss(model(input_ids=batch).logits, batch)}


def settings(**fields: Any) -> Optimisation:
    return Optimisation(**{"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32"} | fields)


def fit(model: nn.Module, loss: Any = lm, section: str = "regularize", **fields: Any) -> Written:
    journal = Written()
    how = {"checkpoints": NoCheckpoints(), "journal": journal, "section": section} | {
        name: fields.pop(name) for name in ("checkpoints", "journal", "callback") if name in fields
    }
    train(model, counting(), loss, settings(**fields), **how)
    return journal


def large() -> LlamaForCausalLM:
    """Return a Llama with weights of more than 4096 numbers, which have states of 8 bits."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**llama().config.to_dict() | {"intermediate_size": 144})).eval()


class TestLearningRate:
    def test_rises_over_the_warm_up_then_falls_towards_0(self) -> None:
        asked = settings(steps=10, warmup=0.2, learning_rate=1.0)
        rates = [learning_rate(step, asked) for step in range(10)]
        assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])

    def test_starts_at_the_peak_without_a_warm_up(self) -> None:
        assert learning_rate(0, settings(warmup=0.0)) == 3e-3

    def test_falls_with_the_width_where_the_recipe_leaves_it_open(self) -> None:
        open_ = settings(learning_rate=None)
        assert with_learning_rate(open_, width=4096).learning_rate == pytest.approx(2e-5, rel=0.05)
        assert with_learning_rate(open_, width=256).learning_rate == pytest.approx(3.1e-4, rel=0.05)
        assert with_learning_rate(open_, width=None).learning_rate == 1e-4
        assert with_learning_rate(settings(learning_rate=0.5), width=4096).learning_rate == 0.5


class TestTraining:
    def test_the_loss_falls_and_every_step_is_told(self) -> None:
        journal = fit(llama(), steps=30)
        loss = journal.curve("loss")
        assert loss[-1] < loss[0] - 1
        assert [step for step, _ in journal.lines] == list(range(1, 31))
        assert journal.done == [(step, 30) for step in range(1, 31)]
        assert set(journal.lines[0][1]) == {"loss", "learning_rate", "gradient_norm"}

    def test_the_model_is_left_in_evaluation_mode_with_its_frozen_weights_untouched(self) -> None:
        model = llama()
        model.model.embed_tokens.requires_grad_(False)
        before = weights(model)
        fit(model)
        assert not model.training
        assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
        assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])

    def test_accumulating_gradients_takes_the_steps_of_the_whole_batch(self) -> None:
        whole, parts = llama(), llama()
        losses = fit(whole), fit(parts, micro_batch_size=2)
        assert losses[0].curve("loss") == pytest.approx(losses[1].curve("loss"), rel=1e-4)

    def test_the_micro_batch_that_fits_takes_the_steps_of_the_whole_batch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = fit(llama()).curve("loss")
        monkeypatch.setattr(loop, "most_windows", lambda *_: 3)
        found = fit(llama(), micro_batch_size="auto")
        assert set(found.curve("micro_batch_size")) == {3.0}
        assert found.curve("loss") == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(("free", "windows"), [(0, 1.0), (2**40, 8.0)])
    def test_the_micro_batch_that_fits_is_found_without_learning_from_it(
        self, free: int, windows: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = fit(llama()).curve("loss")
        monkeypatch.setattr(micro, "free_memory", lambda: free)
        found = fit(llama(), micro_batch_size="auto")
        assert set(found.curve("micro_batch_size")) == {windows}
        assert found.curve("loss") == pytest.approx(expected, rel=1e-4)

    def test_gradient_checkpointing_changes_nothing_even_under_gates(self) -> None:
        gates = torch.tensor([0.3, 1.0, 0.6, 0.0])

        @contextmanager
        def loss(model: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
            with gated(model, gates), lm(model, batch, step) as parts:
                yield parts

        plain, frugal = llama(), llama()
        expected = fit(plain, loss).curve("loss")
        assert fit(frugal, loss, gradient_checkpointing=True).curve("loss") == pytest.approx(expected, rel=1e-5)

    def test_gradients_are_clipped(self) -> None:
        small, large = llama(), llama()
        # AdamW undoes a common scale of the gradients; a norm near its epsilon tells that they were scaled.
        fit(small, clip=1e-12, steps=1)
        fit(large, clip=1.0, steps=1)
        moved = [(model.model.norm.weight - 1).abs().max().item() for model in (small, large)]
        assert moved[0] < 1e-4 < moved[1]


class TestPrecision:
    def test_steps_that_are_small_beside_a_bf16_weight_are_not_lost(self) -> None:
        moved = {}
        for precision in ("auto", "bf16"):
            model = llama(dtype=torch.bfloat16)
            fit(model, precision=precision, learning_rate=4e-4, warmup=0.0, steps=16)
            moved[precision] = (model.model.norm.weight.float() - 1).mean().item()
            assert model.dtype == torch.bfloat16
        assert abs(moved["auto"]) > 2e-4
        assert moved["bf16"] == pytest.approx(moved["auto"], rel=0.5)
        assert fit(llama(dtype=torch.bfloat16), precision="bf16", steps=30).curve("loss")[-1] < 3


class TestOptimizers:
    def test_of_8_bits_learns_as_fast(self) -> None:
        full, small = fit(llama(), steps=30), fit(llama(), steps=30, optimizer="adamw-8bit")
        assert small.curve("loss")[-1] == pytest.approx(full.curve("loss")[-1], rel=0.1)

    def test_with_its_states_elsewhere_takes_the_very_steps(self) -> None:
        beside, elsewhere = llama(), llama()
        fit(beside)
        fit(elsewhere, offload_optimizer=True)
        assert same(weights(elsewhere), weights(beside))


class TestResuming:
    @pytest.mark.parametrize(
        ("killed_at", "fields"),
        [
            (3, {}),
            (5, {}),
            (3, {"precision": "bf16"}),
            (3, {"optimizer": "adamw-8bit", "precision": "bf16"}),
            (3, {"optimizer": "adamw-8bit", "offload_optimizer": True}),
        ],
        ids=str,
    )
    def test_work_killed_and_taken_up_ends_with_the_very_weights(
        self, tmp_path: Path, killed_at: int, fields: dict[str, Any]
    ) -> None:
        uninterrupted, resumed = large(), large()
        fit(uninterrupted, **fields)
        checkpoints = Kept(tmp_path / "kept")
        with pytest.raises(Killed):
            fit(large(), checkpoint_every=2, checkpoints=checkpoints, journal=Written(killed_at=killed_at), **fields)
        assert checkpoints.steps == list(range(2, killed_at, 2))

        rest = fit(resumed, checkpoint_every=2, checkpoints=checkpoints, **fields)

        assert same(weights(resumed), weights(uninterrupted))
        assert rest.done[0] == (killed_at, 6)

    @pytest.mark.parametrize(("wrote", "reads"), [("adamw", "adamw-8bit"), ("adamw-8bit", "adamw")])
    def test_another_optimizer_does_not_take_up_its_states(self, tmp_path: Path, wrote: str, reads: str) -> None:
        checkpoints = Kept(tmp_path / "kept")
        fit(large(), checkpoint_every=4, checkpoints=checkpoints, optimizer=wrote)
        with pytest.raises(
            Refusal, match=f"^regularize.optimizer is {reads}, and the checkpoint of step 4 was written by {wrote}: set"
        ):
            fit(large(), checkpoints=checkpoints, optimizer=reads)

    def test_a_checkpoint_holds_trained_weights_only_and_nothing_pickled(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        model = llama()
        model.model.layers.requires_grad_(False)
        fit(model, checkpoint_every=4, checkpoints=Kept(tmp_path / "kept"))
        shard, *others = sorted((tmp_path / "kept").iterdir())
        assert (shard.suffix, [path.name for path in others]) == (".safetensors", ["state.json"])
        held = {name for name in load_file(shard) if name.startswith("model:")}
        assert held == {"model:model.embed_tokens.weight", "model:model.norm.weight"}


class TestStopping:
    def test_a_loss_that_is_not_finite_names_its_cure_and_harms_neither_weights_nor_checkpoint(
        self, tmp_path: Path
    ) -> None:
        @contextmanager
        def loss(model: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
            with lm(model, batch, step) as parts:
                yield {"loss": parts["loss"] * (float("nan") if step == 4 else 1.0)}

        model, checkpoints = llama(), Kept(tmp_path / "kept")
        with pytest.raises(Refusal, match=r"loss is nan at step 5 of 6 with regularize.learning_rate 0.003: lower it"):
            fit(model, loss, checkpoint_every=2, checkpoints=checkpoints)
        assert checkpoints.latest(tmp_path / "back") == 4
        assert all(weight.isfinite().all() for weight in model.parameters())

    def test_a_gradient_that_is_not_finite_stops_it_too(self) -> None:
        @contextmanager
        def loss(model: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
            with lm(model, batch, step) as parts:
                yield {"loss": parts["loss"] + (parts["loss"] * 0).sqrt()}

        with pytest.raises(Refusal, match="gradient's norm is nan"):
            fit(llama(), loss)

    def test_a_callback_ends_it(self) -> None:
        class Enough:
            def after(self, step: int, model: nn.Module) -> bool:
                return step == 3

            def state(self) -> dict[str, Tensor]:
                return {}

            def restore(self, state: dict[str, Tensor]) -> None:
                pass

        assert fit(llama(), callback=Enough()).done[-1] == (3, 6)


def test_a_loop_leaves_the_random_numbers_of_its_caller_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = llama(seed=5)
    torch.manual_seed(5)
    train(model, counting(), lm, settings(), section="regularize", checkpoints=NoCheckpoints(), journal=Silent())
    assert torch.rand(1) == expected
