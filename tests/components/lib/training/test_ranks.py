"""Several processes share each batch, and end where one process ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from components.lib.recipe.training import Optimisation, Recover, Regularize
from components.lib.training import ranks
from components.lib.training.loop import train
from components.lib.training.objective import lm_loss
from components.lib.training.recover import recover
from components.lib.training.regularize import regularize
from components.lib.training.teacher import keep
from components.lib.transfers.ridge import Ridge
from components.lib.transformer.gates import skipped
from components.lib.transformer.selection import NO_CHANNELS
from tests.components.given import CHANNELS
from tests.components.lib.training.tiny import Kept, Written, chosen, counting, llama, weights

SETTINGS = {"steps": 4, "batch_size": 6, "learning_rate": 3e-3, "precision": "fp32"}

CASES: dict[str, dict[str, Any]] = {
    "anneal": {"anneal": 0.5, "micro_batch_size": 2},
    "autocast": {"anneal": 0.5, "precision": "auto"},
    "penalty": {"schedule": "penalty", "gradient_checkpointing": True},
    "adapters": {"trainable": "lora", "gradient_checkpointing": True, "micro_batch_size": "auto"},
    "kept teacher": {"teacher_top": 8},
    "rounded": {"precision": "bf16", "offload_optimizer": True},
}


def regularized(folder: Path) -> None:
    """Train every case in this process or its group, and leave the weights and the curves in `folder`."""
    for name, settings in CASES.items():
        model, journal = llama(), Written()
        asked = Regularize(**SETTINGS | settings)
        selection = chosen(1, channels=NO_CHANNELS if name == "adapters" else CHANNELS)
        with ranks.shared_folder() as scratch:
            kept = keep(llama(), counting(), asked, scratch) if asked.teacher_top else llama()
            regularize(model, None if name == "adapters" else kept, counting(), selection, asked, journal=journal)
        leave(folder, name, model, journal)
    model, journal = llama(), Written()
    Ridge(windows=9).apply(model, counting(), chosen(1, 2), journal=journal)
    leave(folder, "ridge", model, journal)
    journal = Written()
    tuned = recover(
        llama(), counting(), Recover(**SETTINGS | {"evaluate_every": 2, "validation": 0.25}), journal=journal
    )
    leave(folder, "recovery", tuned, journal)


def leave(folder: Path, name: str, model: nn.Module, journal: Written) -> None:
    """Leave the weights, and the curves in the first process."""
    held = {key: weight for key, weight in weights(model).items() if key != "lm_head.weight"}
    curves = {f"curve.{key}" for _, values in journal.lines for key in values}
    held |= {key: torch.tensor(journal.curve(key.removeprefix("curve."))) for key in curves if ranks.first()}
    save_file(held, folder / f"{name}-{ranks.index()}.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases in one process."""
    folder = tmp_path_factory.mktemp("alone")
    regularized(folder)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases in two processes, which hold the whole model each, or a half."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_PARALLEL", request.param)
        ranks.launch(2, regularized, folder)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [*CASES, "ridge", "recovery"])
def test_two_processes_have_the_losses_and_the_weights_of_one(case: str, alone: Path, shared: Path) -> None:
    rounding = {"rtol": 0.05, "atol": 0.01} if case in ("autocast", "rounded") else {"rtol": 1e-4, "atol": 1e-5}
    one = load_file(alone / f"{case}-0.safetensors")
    first, second = (load_file(shared / f"{case}-{rank}.safetensors") for rank in range(2))
    assert first.keys() == one.keys()
    # Two processes have half a batch each to divide, and those that divide the weights take one window.
    for name in one.keys() - {"curve.micro_batch_size"}:
        torch.testing.assert_close(first[name], one[name], **rounding)
    for name in second:
        assert torch.equal(second[name], first[name])
    assert not torch.equal(one["model.layers.0.mlp.down_proj.weight"], llama().model.layers[0].mlp.down_proj.weight)


class KilledAt:
    """Ends the second process at a step, as the kernel does if there is no memory."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after(self, step: int, model: nn.Module) -> bool:
        if step == self.step and ranks.index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(1)}

    def restore(self, state: dict[str, Tensor]) -> None:
        assert state["seen"] == 1


@contextmanager
def lm(model: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
    """The LM loss without the second layer, whose weights have no gradient, and so no states."""
    with skipped(model, [1]):
        yield {"loss": lm_loss(model(input_ids=batch).logits, batch)}


def trained(folder: Path, killed_at: int = 0, fields: Mapping[str, Any] | None = None) -> None:
    """Train for six steps, with a checkpoint every other step."""
    torch.manual_seed(0)
    # Wide enough for states of 8 bits.
    model = LlamaForCausalLM(LlamaConfig(**llama().config.to_dict() | {"intermediate_size": 144})).eval()
    journal = Written()
    kept = Kept(folder / "kept")
    kept.steps = [2] if kept.folder.exists() else []
    settings = Optimisation(**SETTINGS | {"steps": 6, "checkpoint_every": 2} | (fields or {}))
    callback = KilledAt(killed_at)
    train(
        model,
        counting(),
        lm,
        settings,
        section="regularize",
        checkpoints=kept,
        journal=journal,
        callback=callback,
        divided=ranks.must_divide(model, None, settings),
    )
    leave(folder, "trained", model, journal)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("parallel", "fields", "far"),
    [
        ("fsdp", {}, {"rtol": 1e-4, "atol": 1e-5}),
        ("fsdp", {"precision": "bf16", "offload_optimizer": True}, {"rtol": 0.05, "atol": 0.01}),
        ("ddp", {"optimizer": "adamw-8bit"}, {"rtol": 0.05, "atol": 0.005}),
    ],
    ids=["adamw", "bf16 elsewhere", "8 bits"],
)
def test_a_killed_process_is_named_and_another_number_of_processes_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: str, fields: dict[str, Any], far: dict[str, float]
) -> None:
    monkeypatch.setenv("ESPALIER_PARALLEL", parallel)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    with pytest.raises(ranks.ProcessFailed, match=r"^process 2 of 2 was killed by SIGKILL.* from the last checkpoint$"):
        ranks.launch(2, trained, shared, 3, fields)
    ranks.launch(4, trained, shared, 0, fields)  # six windows a step: two processes have two, two have one
    trained(alone, 0, fields)
    one, four = (load_file(folder / "trained-0.safetensors") for folder in (alone, shared))
    assert len(one["curve.loss"]) == 6
    torch.testing.assert_close(four.pop("curve.loss"), one.pop("curve.loss")[2:], **far)
    for name in (name for name in one if not name.startswith("curve")):
        torch.testing.assert_close(four[name], one[name], **far)


def fail() -> None:
    if ranks.index() == 1:
        raise KeyError("absent")
    ranks.wait()


@pytest.mark.timeout(900)
def test_an_error_names_its_process() -> None:
    with pytest.raises(ranks.ProcessFailed, match=r"^process 2 of 2 failed with KeyError: 'absent': a new run goes on"):
        ranks.launch(2, fail)


def machine(number: int, port: int, folder: Path, processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """Be one of two machines, which share no folder for temporary files, and leave the error in `folder`."""
    folder.mkdir()
    os.environ |= {
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(number),
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": str(port),
        "TMPDIR": str(folder),
        "GLOO_SOCKET_IFNAME": ranks.LOOPBACK,
    }
    try:
        ranks.launch(processes, work, *arguments)
    except ranks.ProcessFailed as error:
        (folder / "error.txt").write_text(str(error))


def on_two_machines(folder: Path, processes: int, work: Callable[..., None], *arguments: Any) -> list[str]:
    """Launch the work on two machines as a TrainJob does, and return the error of each; empty if it has none."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folders = [folder / f"machine-{number}" for number in range(2)]
    context = multiprocessing.get_context("spawn")
    machines = [
        context.Process(target=machine, args=(number, port, own, processes, work, *arguments))
        for number, own in enumerate(folders)
    ]
    for one in machines:
        one.start()
    for one in machines:
        one.join()
    assert [one.exitcode for one in machines] == [0, 0]
    left = [own / "error.txt" for own in folders]
    return [file.read_text() if file.exists() else "" for file in left]


@pytest.mark.timeout(900)
def test_the_processes_of_two_machines_are_one_group_and_its_shards_come_to_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_PARALLEL", "fsdp")
    alone, shared, first, second = (tmp_path / name for name in ("alone", "shared", "first", "second"))
    for folder in (alone, shared, first, second):
        folder.mkdir()
    errors = on_two_machines(first, 1, trained, shared, 3)  # of each, the second is killed at the third step
    assert errors[1].startswith("process 2 of 2 was killed by SIGKILL")
    assert errors[0].startswith("process 1 of 2 failed with")
    assert len(list((shared / "kept").glob("*.safetensors"))) == 3  # a shard of each, and the callback's state
    assert on_two_machines(second, 2, trained, shared) == ["", ""]
    trained(alone)
    one, four = (load_file(folder / "trained-0.safetensors") for folder in (alone, shared))
    torch.testing.assert_close(four.pop("curve.loss"), one.pop("curve.loss")[2:], rtol=1e-4, atol=1e-5)
    for name in (name for name in one if not name.startswith("curve")):
        torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5)


def look(folder: Path) -> None:
    """Leave the addresses that this process and its launcher listen on, as /proc has them."""
    ranks.wait()
    own = {
        str(link.readlink())
        for pid in (os.getpid(), os.getppid())
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink()
    }
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}
    (folder / f"{ranks.index()}.txt").write_text(" ".join(listening))


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_no_process_listens_on_an_address_that_others_reach(tmp_path: Path) -> None:
    ranks.launch(2, look, tmp_path)
    addresses = {address for rank in range(2) for address in (tmp_path / f"{rank}.txt").read_text().split()}
    assert addresses <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1


class Placed(nn.Linear):
    """A layer that notes where it is put."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.places: list[str] = []

    def to(self, device: Any) -> Any:
        self.places.append(torch.device(device).type)
        return self


@pytest.mark.parametrize(("memory", "places"), [(361, ["cuda", "cpu"]), (359, [])])
def test_a_model_is_put_on_the_device_and_back_unless_it_leaves_no_room(
    monkeypatch: pytest.MonkeyPatch, memory: int, places: list[str]
) -> None:
    monkeypatch.setattr(ranks, "join", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    model = Placed()  # of 288 bytes
    with ranks.on_device(model):
        assert model.places == places[:1]
    assert model.places == places


@pytest.mark.parametrize(
    ("fields", "each"),
    [
        ({}, 16),
        ({"precision": "bf16"}, 8),
        ({"offload_optimizer": True}, 8),
        ({"offload_optimizer": True, "precision": "bf16"}, 4),
    ],
    ids=str,
)
def test_the_weights_are_divided_if_a_training_takes_half_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], each: int
) -> None:
    settings = Optimisation(**SETTINGS | {"precision": "auto"} | fields)
    model, teacher = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)  # of 64 numbers
    needed = 64 * each + 64 * 4
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def divides(memory: int, trained: nn.Module | None, settings: Optimisation = settings) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
        return ranks.must_divide(trained, teacher, settings)

    assert not divides(2 * needed, model)
    assert divides(2 * needed - 1, model)
    assert not divides(2 * 64 * 4, None)  # the teacher alone
    # States of 8 bits cannot be divided.
    assert not divides(1, model, settings.model_copy(update={"optimizer": "adamw-8bit"}))
    monkeypatch.setenv("ESPALIER_PARALLEL", "fsdp")
    assert divides(2 * needed, model)


def test_a_process_alone_is_the_first_of_one() -> None:
    rows = torch.arange(3)
    assert (ranks.count(), ranks.index(), ranks.first()) == (1, 0, True)
    assert torch.equal(ranks.share(rows), rows)
    assert ranks.share_here(3) == range(3)
    assert ranks.summed(rows) is rows
    assert ranks.told("word") == "word"
