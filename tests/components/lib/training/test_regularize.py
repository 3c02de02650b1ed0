"""Regularising, its controls, and what stays true of the model."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from components.lib.errors import Refusal
from components.lib.recipe.training import Lora, Objective, Regularize
from components.lib.training.regularize import keeps_teacher, needs_teacher, regularize
from components.lib.training.teacher import keep, size
from components.lib.training.windows import Windows, training_file, training_windows
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.gates import final_state, skipped, watched
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import AXES, NOTHING, Channels
from components.lib.transformer.surgery import cut_checkpoint, drop_layers
from tests.components.lib.training.tiny import VOCABULARY, Kept, Killed, Written, chosen, counting, llama, same, weights
from tests.components.lib.transformer.zoo import SPECIMENS, draw_channels

LM = Objective(lm=1, kl=0, state=0)


@pytest.fixture(scope="module")
def taught() -> LlamaForCausalLM:
    """A dense model that has learnt to count, so that removing a layer costs something."""
    return regularize(llama(), None, counting(), NOTHING, settings(steps=60, objective=LM))


@pytest.fixture(scope="module")
def channels(taught: LlamaForCausalLM) -> Channels:
    """Half of every axis."""
    return draw_channels(taught)


def settings(**fields: Any) -> Regularize:
    return Regularize(**{"steps": 20, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32"} | fields)


def change(model: LlamaForCausalLM, layer: int) -> float:
    """Return ‖f(x) − x‖² / ‖x‖² of a layer over the text."""
    with watched(model, [layer]) as seen, torch.no_grad():
        model(input_ids=counting())
        x, f = seen[layer]
        return ((f - x).square().sum() / x.square().sum()).item()


def test_annealed_layers_can_go_without_loss(taught: LlamaForCausalLM) -> None:
    removed = [1, 2]
    cut = perplexity(drop_layers(copy.deepcopy(taught), removed), counting())
    model = regularize(copy.deepcopy(taught), taught, counting(), chosen(*removed), settings())
    after = perplexity(drop_layers(model, removed), counting())
    assert after < 0.7 * cut


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_penalty_makes_the_chosen_layers_nearly_the_identity(taught: LlamaForCausalLM, norm: str) -> None:
    fields = {"schedule": "penalty", "norm": norm, "objective": LM, "steps": 40}
    penalised = regularize(copy.deepcopy(taught), None, counting(), chosen(1), settings(strength=3.0, **fields))
    free = regularize(copy.deepcopy(taught), None, counting(), chosen(1), settings(strength=0.0, **fields))
    assert change(penalised, 1) < 0.3 * change(free, 1)
    assert change(penalised, 2) > change(penalised, 1)


def test_the_curve_has_every_part_by_name(taught: LlamaForCausalLM) -> None:
    journal = Written()
    regularize(
        copy.deepcopy(taught), taught, counting(), chosen(1), settings(steps=2, schedule="penalty"), journal=journal
    )
    assert set(journal.lines[0][1]) == {"loss", "lm", "kl", "state", "penalty", "learning_rate", "gradient_norm"}
    assert journal.lines[0][1]["kl"] == pytest.approx(0, abs=1e-5)  # nothing has moved yet


def test_a_control_gets_the_objective_alone(taught: LlamaForCausalLM) -> None:
    journal = Written()
    asked = settings(steps=2, schedule="penalty")
    cut = drop_layers(copy.deepcopy(taught), [1])
    regularize(cut, taught, counting(), chosen(1), asked, already_cut=True, journal=journal)
    assert "penalty" not in journal.lines[0][1]


def test_cutting_first_is_annealing_over_no_step(taught: LlamaForCausalLM) -> None:
    """The candidate and its control differ in when the layers go, and in nothing else."""
    candidate = regularize(copy.deepcopy(taught), taught, counting(), chosen(1), settings(steps=4, anneal=0.01))
    control = regularize(
        drop_layers(copy.deepcopy(taught), [1]), taught, counting(), chosen(1), settings(steps=4), already_cut=True
    )
    assert same(weights(drop_layers(candidate, [1])), weights(control))


def test_the_teacher_does_not_move(taught: LlamaForCausalLM) -> None:
    before = weights(taught)
    regularize(copy.deepcopy(taught), taught, counting(), chosen(1), settings(steps=2))
    assert same(weights(taught), before)


def test_the_model_comes_back_in_the_type_it_came_in(taught: LlamaForCausalLM) -> None:
    model = regularize(
        copy.deepcopy(taught).bfloat16(), taught, counting(), chosen(1), settings(steps=2, precision="auto")
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


class TestAdapters:
    def test_their_teacher_is_the_model_without_them_and_without_its_gates(self, taught: LlamaForCausalLM) -> None:
        asked = settings(steps=6, trainable="lora", lora=Lora(rank=4), anneal=0.5)
        own, given = Written(), Written()
        assert not needs_teacher(asked)
        regularize(copy.deepcopy(taught), None, counting(), chosen(1), asked, journal=own)
        regularize(copy.deepcopy(taught), taught, counting(), chosen(1), asked, journal=given)
        assert own.curve("kl") == pytest.approx(given.curve("kl"), rel=1e-4)

    def test_they_are_merged_into_a_plain_model_that_computes_the_same(self, taught: LlamaForCausalLM) -> None:
        model = regularize(
            copy.deepcopy(taught), None, counting(), chosen(1), settings(trainable="lora", lora=Lora(rank=4), steps=30)
        )
        assert weights(model).keys() == weights(taught).keys()
        with skipped(taught, [1]):
            assert perplexity(drop_layers(model, [1]), counting()) < perplexity(taught, counting())

    def test_a_control_with_adapters_needs_the_dense_model(self, taught: LlamaForCausalLM) -> None:
        assert needs_teacher(settings(trainable="lora"), already_cut=True)
        cut = drop_layers(copy.deepcopy(taught), [1])
        with pytest.raises(ValueError, match="give it as the teacher"):
            regularize(cut, None, counting(), chosen(1), settings(trainable="lora"), already_cut=True)


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize(("anneal", "killed_at"), [(0.6, 3), (0.6, 5), (0, 3)])
def test_killed_and_taken_up_it_ends_with_the_very_weights(
    taught: LlamaForCausalLM, tmp_path: Path, trainable: str, anneal: float, killed_at: int
) -> None:
    """Killed while the gates fall, when the layers are skipped already, and skipped from the first step: they then have no states."""
    asked = settings(steps=6, anneal=anneal, trainable=trainable, lora=Lora(rank=4, dropout=0.2), checkpoint_every=2)
    uninterrupted = regularize(copy.deepcopy(taught), taught, counting(), chosen(1, 2), asked)
    checkpoints = Kept(tmp_path / "kept")
    journal = Written(killed_at=killed_at)
    with pytest.raises(Killed):
        regularize(
            copy.deepcopy(taught), taught, counting(), chosen(1, 2), asked, checkpoints=checkpoints, journal=journal
        )
    resumed = regularize(copy.deepcopy(taught), taught, counting(), chosen(1, 2), asked, checkpoints=checkpoints)
    assert same(weights(resumed), weights(uninterrupted))


class TestKeptTeacher:
    """The dense model's outputs come from files instead of a second model."""

    @pytest.mark.parametrize("trainable", ["all", "lora"])
    def test_with_the_whole_vocabulary_the_curves_are_those_beside_the_model(
        self, taught: LlamaForCausalLM, trainable: str, tmp_path: Path
    ) -> None:
        asked = settings(steps=8, trainable=trainable, lora=Lora(rank=4))
        beside, kept = Written(), Written()
        regularize(copy.deepcopy(taught), taught, counting(), chosen(1), asked, journal=beside)
        asked = asked.model_copy(update={"teacher_top": VOCABULARY})
        assert keeps_teacher(asked)
        assert not needs_teacher(asked)
        outputs = keep(taught, counting(), asked, tmp_path)
        regularize(copy.deepcopy(taught), outputs, counting(), chosen(1), asked, journal=kept)
        for part in ("loss", "kl", "state"):
            assert kept.curve(part) == pytest.approx(beside.curve(part), rel=1e-3, abs=1e-6)

    def test_a_few_probabilities_give_nearly_the_same(self, taught: LlamaForCausalLM, tmp_path: Path) -> None:
        asked = settings(steps=8)
        beside, kept = Written(), Written()
        regularize(copy.deepcopy(taught), taught, counting(), chosen(1), asked, journal=beside)
        asked = asked.model_copy(update={"teacher_top": 8})
        regularize(
            copy.deepcopy(taught), keep(taught, counting(), asked, tmp_path), counting(), chosen(1), asked, journal=kept
        )
        assert kept.curve("lm") == pytest.approx(beside.curve("lm"), rel=0.02)
        assert all(few <= whole + 1e-6 for few, whole in zip(kept.curve("kl")[:1], beside.curve("kl")[:1], strict=True))

    def test_only_what_is_compared_of_windows_that_are_seen_is_kept(
        self, taught: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        asked = settings(steps=1, batch_size=3, teacher_top=4, objective=Objective(lm=1, kl=1, state=0))
        keep(taught, counting(windows=24, length=16), asked, tmp_path)
        assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == {
            "tokens": 3 * 16 * 4 * 4,
            "logs": 3 * 16 * 5 * 4,
        }
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) == size(24, 16, 32, 4, asked)

    def test_removed_channels_of_the_state_are_left_out(
        self, taught: LlamaForCausalLM, channels: Channels, tmp_path: Path
    ) -> None:
        asked = settings(steps=3, teacher_top=VOCABULARY)
        beside, kept = Written(), Written()
        regularize(
            copy.deepcopy(taught),
            taught,
            counting(),
            chosen(channels=channels),
            asked.model_copy(update={"teacher_top": None}),
            journal=beside,
        )
        outputs = keep(taught, counting(), asked, tmp_path)
        regularize(copy.deepcopy(taught), outputs, counting(), chosen(channels=channels), asked, journal=kept)
        assert kept.curve("state") == pytest.approx(beside.curve("state"), rel=1e-3)

    def test_killed_and_taken_up_with_outputs_kept_anew_it_ends_with_the_very_weights(
        self, taught: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        asked = settings(steps=6, teacher_top=8, checkpoint_every=2, precision="auto")
        ends = []
        checkpoints = Kept(tmp_path / "kept")
        for number, killed_at in enumerate((None, 3, None)):
            (folder := tmp_path / str(number)).mkdir()
            outputs, model = keep(taught, counting(), asked, folder), copy.deepcopy(taught)
            told: dict[str, Any] = {"checkpoints": checkpoints} if number else {}
            with contextlib.suppress(Killed):
                regularize(model, outputs, counting(), chosen(1), asked, journal=Written(killed_at=killed_at), **told)
            ends.append(weights(model))
        assert same(ends[2], ends[0])

    def test_windows_in_files_are_those_in_memory(self, taught: LlamaForCausalLM, tmp_path: Path) -> None:
        save_file({"windows": counting()[:16].int()}, tmp_path / training_file(0))
        save_file({"windows": counting()[16:].int()}, tmp_path / training_file(1))
        (tmp_path / "training.json").write_text('{"windows": 24, "per_file": 16}')
        asked = settings(steps=6, teacher_top=VOCABULARY)
        files = training_windows(tmp_path, counting())
        assert isinstance(files, Windows)
        beside, kept = Written(), Written()
        plain = asked.model_copy(update={"teacher_top": None})
        regularize(copy.deepcopy(taught), taught, files, chosen(1), plain, journal=beside)
        regularize(copy.deepcopy(taught), keep(taught, files, asked, tmp_path), files, chosen(1), asked, journal=kept)
        assert kept.curve("loss") == pytest.approx(beside.curve("loss"), rel=1e-3)

    def test_a_disk_without_room_is_refused_before_the_work(
        self, taught: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(
            Refusal, match=r"regularize.teacher_top keeps .* GB of the dense model's outputs in .*: lower it"
        ):
            keep(taught, counting(), settings(teacher_top=8), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_they_are_missed_by_name(self, taught: LlamaForCausalLM) -> None:
        with pytest.raises(ValueError, match="give it as the teacher"):
            regularize(copy.deepcopy(taught), None, counting(), chosen(1), settings(teacher_top=8))

    def test_there_is_nothing_to_keep_of_a_teacher_without_weight(self) -> None:
        with pytest.raises(ValueError, match=r"teacher_top is 8, but objective.kl and objective.state are 0"):
            settings(teacher_top=8, objective=LM)


def test_no_schedule_leaves_the_model_alone(taught: LlamaForCausalLM) -> None:
    model = copy.deepcopy(taught)
    assert regularize(model, None, counting(), chosen(1), settings(schedule="none")) is model
    assert same(weights(model), weights(taught))


class TestChannels:
    @pytest.mark.parametrize("axes", [("hidden",), ("ffn",), AXES], ids="+".join)
    def test_annealed_can_go_without_loss(self, taught: LlamaForCausalLM, axes: Any, tmp_path: Path) -> None:
        channels = draw_channels(taught, axes)
        model = regularize(copy.deepcopy(taught), taught, counting(), chosen(channels=channels), settings(steps=30))
        with narrowed(model, channels):
            annealed = perplexity(model, counting())
        assert perplexity(cut(model, channels, tmp_path / "after"), counting()) == pytest.approx(annealed, rel=1e-4)
        assert annealed < 0.7 * perplexity(cut(taught, channels, tmp_path / "before"), counting())

    def test_go_together_with_layers(self, taught: LlamaForCausalLM, channels: Channels, tmp_path: Path) -> None:
        asked = chosen(1, channels=channels)
        model = regularize(copy.deepcopy(taught), taught, counting(), asked, settings(steps=30))
        with narrowed(model, channels), skipped(model, [1]):
            annealed = perplexity(model, counting())
        after = perplexity(cut(model, channels, tmp_path / "after", layers=(1,)), counting())
        assert after == pytest.approx(annealed, rel=1e-4)
        assert after < 0.7 * perplexity(cut(taught, channels, tmp_path / "before", layers=(1,)), counting())

    def test_slices_end_at_0_behind_annealed_gates(self, taught: LlamaForCausalLM, channels: Channels) -> None:
        journal = Written()
        asked = settings(steps=6, anneal=0.5)
        regularize(copy.deepcopy(taught), taught, counting(), chosen(channels=channels), asked, journal=journal)
        for part in ("attention", "ffn", "rest"):
            first, *falling = journal.curve(f"slices_{part}")
            assert first == pytest.approx(1)
            assert falling[2:] == [0, 0, 0]
        assert journal.curve("penalty") == []

    @pytest.mark.parametrize(("layers", "steps"), [((), 2), ((1,), 6)])
    def test_alone_are_annealed_over_fewer_steps_than_with_layers(
        self, taught: LlamaForCausalLM, layers: tuple[int, ...], steps: int
    ) -> None:
        channels, journal = draw_channels(taught, ("ffn",)), Written()
        asked = settings(steps=40)
        regularize(
            copy.deepcopy(taught), taught, counting(), chosen(*layers, channels=channels), asked, journal=journal
        )
        norms = journal.curve("slices_ffn")
        assert sum(norm > 0 for norm in norms) == steps
        assert len(norms) == 40

    @pytest.mark.parametrize("norm", ["l1", "l2"])
    def test_the_penalty_lowers_their_slices(self, taught: LlamaForCausalLM, channels: Channels, norm: str) -> None:
        fields = {"schedule": "penalty", "norm": norm, "objective": LM, "ramp": 0.0, "learning_rate": 1e-2}
        penalised, free = Written(), Written()
        for journal, strength in ((penalised, 30.0), (free, 0.0)):
            asked = settings(strength=strength, **fields)
            regularize(copy.deepcopy(taught), None, counting(), chosen(channels=channels), asked, journal=journal)
        # Most of the rest are norms, whose weights are about 1: far to go for steps of this size.
        for part, most in (("attention", 0.6), ("ffn", 0.6), ("rest", 0.9)):
            first, *_, last = penalised.curve(f"slices_{part}")
            assert first == pytest.approx(1)
            assert last < most * free.curve(f"slices_{part}")[-1]

    def test_the_penalty_is_the_sum_of_the_parts_times_the_strength(
        self, taught: LlamaForCausalLM, channels: Channels
    ) -> None:
        journal = Written()
        asked = settings(steps=2, schedule="penalty", strength=0.5, ramp=0.0, objective=LM)
        regularize(copy.deepcopy(taught), None, counting(), chosen(1, channels=channels), asked, journal=journal)
        for _, said in journal.lines:
            slices = said["slices_attention"] + said["slices_ffn"] + said["slices_rest"]
            assert said["loss"] == pytest.approx(said["lm"] + 0.5 * (said["penalty"] + slices), rel=1e-5)

    def test_the_final_state_is_compared_in_what_stays(self, taught: LlamaForCausalLM, channels: Channels) -> None:
        """With the gates at 0 from the first step."""
        journal = Written()
        asked = settings(steps=2, anneal=0.01, batch_size=24)
        regularize(copy.deepcopy(taught), taught, counting(), chosen(channels=channels), asked, journal=journal)

        stays = [channel for channel in range(32) if channel not in channels.hidden]
        with torch.no_grad(), final_state(taught) as final:
            taught(input_ids=counting())
            whole = final.value[..., stays]  # type: ignore[index]
            with narrowed(taught, channels):
                taught(input_ids=counting())
                found = final.value[..., stays]  # type: ignore[index]
        expected = ((found - whole).square().sum(-1) / whole.square().sum(-1)).mean().item()
        assert journal.curve("state")[0] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("layers", [(), (1,)], ids=["channels", "layers and channels"])
    def test_cutting_first_is_annealing_over_no_step(
        self, taught: LlamaForCausalLM, channels: Channels, layers: tuple[int, ...], tmp_path: Path
    ) -> None:
        """The candidate and its control differ in when the channels go, and in nothing else."""
        asked, selection = settings(steps=4, anneal=0.01), chosen(*layers, channels=channels)
        candidate, control = Written(), Written()
        model = regularize(copy.deepcopy(taught), taught, counting(), selection, asked, journal=candidate)
        narrow = cut(taught, channels, tmp_path / "first", layers)
        regularize(narrow, taught, counting(), selection, asked, already_cut=True, journal=control)
        for name in ("loss", "lm", "kl", "state", "learning_rate"):
            assert candidate.curve(name) == pytest.approx(control.curve(name), rel=1e-3)
        late = cut(model, channels, tmp_path / "last", layers)
        assert perplexity(late, counting()) == pytest.approx(perplexity(narrow, counting()), rel=1e-3)

    def test_a_control_has_no_slices_and_no_gates(self, taught: LlamaForCausalLM, tmp_path: Path) -> None:
        channels = draw_channels(taught, ("ffn",))
        journal = Written()
        asked = settings(steps=2, schedule="penalty")
        narrow = cut(taught, channels, tmp_path)
        regularize(narrow, taught, counting(), chosen(channels=channels), asked, already_cut=True, journal=journal)
        assert set(journal.lines[0][1]) == {"loss", "lm", "kl", "state", "learning_rate", "gradient_norm"}

    def test_a_control_narrowed_first_is_trained_at_the_release_s_rate(
        self, taught: LlamaForCausalLM, channels: Channels, tmp_path: Path
    ) -> None:
        asked = settings(steps=2, learning_rate=None)
        candidate, control = Written(), Written()
        selection = chosen(channels=channels)
        regularize(copy.deepcopy(taught), taught, counting(), selection, asked, journal=candidate)
        narrow = cut(taught, channels, tmp_path / "cut")
        regularize(narrow, taught, counting(), selection, asked, already_cut=True, journal=control)
        assert control.curve("learning_rate") == candidate.curve("learning_rate")

    def test_adapters_learn_to_do_without_them(
        self, taught: LlamaForCausalLM, channels: Channels, tmp_path: Path
    ) -> None:
        asked = settings(steps=20, trainable="lora", lora=Lora(rank=4), learning_rate=1e-2)
        model = regularize(copy.deepcopy(taught), None, counting(), chosen(channels=channels), asked)
        after = perplexity(cut(model, channels, tmp_path / "after"), counting())
        assert after < 0.8 * perplexity(cut(taught, channels, tmp_path / "before"), counting())

    def test_the_teacher_of_adapters_is_the_model_without_them_and_without_its_gates(
        self, taught: LlamaForCausalLM, channels: Channels
    ) -> None:
        asked = settings(steps=4, trainable="lora", lora=Lora(rank=4), anneal=0.5)
        own, given = Written(), Written()
        for journal, teacher in ((own, None), (given, taught)):
            model = copy.deepcopy(taught)
            regularize(model, teacher, counting(), chosen(channels=channels), asked, journal=journal)
        for name in ("kl", "state"):
            assert own.curve(name) == pytest.approx(given.curve(name), rel=1e-3, abs=1e-6)

    def test_killed_and_taken_up_their_slices_begin_where_they_began(
        self, taught: LlamaForCausalLM, channels: Channels, tmp_path: Path
    ) -> None:
        asked = settings(steps=6, schedule="penalty", objective=LM, checkpoint_every=2)
        selection = chosen(channels=channels)
        uninterrupted, resumed = Written(), Written()
        whole = regularize(copy.deepcopy(taught), None, counting(), selection, asked, journal=uninterrupted)
        kept = Kept(tmp_path / "kept")
        journal = Written(killed_at=5)
        with pytest.raises(Killed):
            regularize(copy.deepcopy(taught), None, counting(), selection, asked, checkpoints=kept, journal=journal)
        model = regularize(copy.deepcopy(taught), None, counting(), selection, asked, checkpoints=kept, journal=resumed)
        assert same(weights(model), weights(whole))
        assert resumed.curve("slices_ffn") == uninterrupted.curve("slices_ffn")[4:]


def cut(model: PreTrainedModel, channels: Channels, folder: Path, layers: tuple[int, ...] = ()) -> PreTrainedModel:
    """Return the model without channels and layers, by way of the disk."""
    model.save_pretrained(folder / "whole")
    cut_checkpoint(folder / "whole", folder / "cut", layers, channels)
    return load_model(folder / "cut")


@pytest.fixture(scope="module")
def mixture() -> PreTrainedModel:
    """A mixture that has learnt to count."""
    (specimen,) = (specimen for specimen in SPECIMENS if specimen.name == "mixtral")
    return regularize(specimen.model(2), None, counting(), NOTHING, settings(steps=30, objective=LM))


class TestExperts:
    experts = Channels(experts=((0, 2), (1, 3)))

    def test_annealed_can_go_without_loss(self, mixture: PreTrainedModel, tmp_path: Path) -> None:
        asked, selection = settings(steps=20, anneal=0.5), chosen(channels=self.experts)
        model = regularize(copy.deepcopy(mixture), mixture, counting(), selection, asked)
        with narrowed(model, self.experts):
            annealed = perplexity(model, counting())
        assert perplexity(cut(model, self.experts, tmp_path / "after"), counting()) == pytest.approx(annealed, rel=1e-6)
        assert annealed < 0.9 * perplexity(cut(mixture, self.experts, tmp_path / "before"), counting())

    def test_cutting_first_is_annealing_over_no_step(self, mixture: PreTrainedModel, tmp_path: Path) -> None:
        """The candidate and its control differ in when the experts go, and in nothing else: the router learns alike."""
        asked, selection = settings(steps=4, anneal=0), chosen(channels=self.experts)
        candidate, control = Written(), Written()
        regularize(copy.deepcopy(mixture), mixture, counting(), selection, asked, journal=candidate)
        few = cut(mixture, self.experts, tmp_path)
        regularize(few, mixture, counting(), selection, asked, already_cut=True, journal=control)
        assert candidate.curve("loss") == pytest.approx(control.curve("loss"), rel=1e-4)
