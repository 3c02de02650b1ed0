"""The processes that share a training, one for each device of a machine, or of several machines.

Every process computes a part of each batch, and the gradients are averaged, so that the weights after a step are those of one process, to
rounding. Each holds the whole model (DDP) or a part of it (FSDP2). The first process alone writes. torch's elastic launcher starts the
processes of a machine, and ends all of them when one fails; the launchers of several machines meet as the variables PET_* say, which a
TrainJob sets in each of its nodes. A process that was started alone is the first of one: every function here holds for it too.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from components.lib.errors import refusal_from
from components.lib.settings import NodeSettings, ProcessSettings
from components.lib.transformer.device import best_device
from components.lib.transformer.gates import blocks

if TYPE_CHECKING:
    from components.lib.recipe.training import Optimisation

Value = TypeVar("Value")

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: the first one uploads checkpoints meanwhile. The launcher notices one that ended at once."""

MEETING = timedelta(hours=1)
"""How long a machine waits for the first one: images are pulled meanwhile."""

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""The network interface that other machines do not reach."""

HELD_BACK = 1.5
"""Seconds that an error waits: the end of one process breaks the connections of the others, and the launcher must see the first one first."""


PIECE = 2**26
"""Bytes of a file that are sent from machine to machine at once."""


class ProcessFailed(Exception):
    """One of the processes failed with an error that is not a refusal."""


def launch(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(*arguments)` in several processes of this machine, joined to one group, and return when all have ended.

    If PET_NNODES is more than 1, each of so many machines must call this, and the processes of all of them are one group.

    Args:
        processes: how many on each machine.
        work: a function of a module; both it and the arguments are pickled for the new processes.
        arguments: its arguments.

    Raises:
        Refusal: a process of this machine raised it.
        ProcessFailed: a process of this machine ended otherwise; the message names the process and its error.
    """
    nodes = NodeSettings()
    with tempfile.TemporaryDirectory() as logs:
        meeting = _across(nodes) if nodes.nnodes > 1 else _within(Path(logs))
        config = LaunchConfig(
            min_nodes=nodes.nnodes,
            max_nodes=nodes.nnodes,
            nproc_per_node=processes,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **meeting,
        )
        store = "env://" if nodes.nnodes > 1 else f"file://{Path(logs) / 'processes'}"
        try:
            elastic_launch(config, _joined)(store, work, *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise _said(rank, failure, processes * nodes.nnodes) from None


def _within(logs: Path) -> dict[str, Any]:
    """Return the launcher's settings for one machine.

    Its processes find each other by files: the stores that torch starts otherwise listen on every address.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return {
        "run_id": uuid.uuid4().hex,
        "rdzv_backend": "c10d",
        "rdzv_configs": {"store_type": "file"},
        "rdzv_endpoint": str(logs / "launcher"),
        "local_addr": "localhost",
    }


def _across(nodes: NodeSettings) -> dict[str, Any]:
    """Return the launcher's settings for one of several machines, which meet at a port of the first one."""
    return {
        "run_id": "espalier",
        "rdzv_backend": "static",
        "rdzv_configs": {"rank": nodes.node_rank, "timeout": MEETING.total_seconds()},
        "rdzv_endpoint": f"{nodes.master_addr}:{nodes.master_port}",
    }


def _joined(store: str, work: Callable[..., None], *arguments: Any) -> None:
    """Run the work in one of the new processes, which meet at the URL `store`."""
    try:
        if store.startswith("file:"):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, LOOPBACK)
        join(store)
        work(*arguments)
        wait()
    except BaseException:
        time.sleep(HELD_BACK)
        raise
    distributed.destroy_process_group()


def _said(rank: int, failure: ProcessFailure, processes: int) -> Exception:
    """Return the error of the process that failed first as one of this process."""
    # The launcher reads the error from a file that the process wrote; one that was killed wrote none.
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    if refusal := refusal_from(message):
        return refusal
    if failure.exitcode < 0:
        ended = f"was killed by {failure.signal_name()}, as a process that takes too much memory is"
    else:
        ended = f"failed with {message.splitlines()[0]}"
    return ProcessFailed(f"process {rank + 1} of {processes} {ended}: a new run goes on from the last checkpoint")


def join(meeting: str = "env://") -> torch.device:
    """Join the group of processes that the environment names, as torchrun does, and return this process's device.

    Args:
        meeting: the URL by which the processes find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            # The processes share the processor.
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=PATIENCE)
    device = best_device()
    return torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" else device


def count() -> int:
    """Return how many processes share the work."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    """Return the number of this process, counted from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def first() -> bool:
    """Return True in the process that writes."""
    return index() == 0


def first_here() -> bool:
    """Return True in one process of each machine: the one that writes files which the others of the machine read."""
    return count() == 1 or _local("RANK") == 0


def _local(name: str) -> int:
    """Return the number of this process on its machine (RANK), or how many it has (WORLD_SIZE): the launcher names both."""
    return int(os.environ[f"LOCAL_{name}"])


def wait() -> None:
    """Wait for every process to come here."""
    if count() > 1:
        distributed.barrier()


def share(rows: Tensor) -> Tensor:
    """Return this process's part of the rows (rows, …): every n-th of them."""
    return rows[index() :: count()]


def share_here(rows: int) -> range:
    """Return this process's part of so many rows that the processes of its machine divide.

    All have parts of the same size, since processes that divide the weights wait for each other in every pass: some rows are then in two parts.
    """
    own, here = (0, 1) if count() == 1 else (_local("RANK"), _local("WORLD_SIZE"))
    size = -(-rows // here)
    first = min(own * size, rows - size)
    return range(first, first + size)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, the same bits in each of them."""
    if count() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def least(value: int) -> int:
    """Return the smallest of the processes' values, the same in each of them."""
    return min(_told_all(value)) if count() > 1 else value


def told(value: Value) -> Value:
    """Return the value that the first process has."""
    if count() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def shared_folder(within: Path | None = None) -> Iterator[Path]:
    """Yield the same empty folder in every process of a machine, and remove it when all processes have left the block."""
    made = tempfile.mkdtemp(prefix="espalier-", dir=within) if first_here() else ""
    folder = Path(made if count() == 1 else _told_all(made)[index() - _local("RANK")])
    try:
        yield folder
        wait()
    finally:
        if first_here():
            shutil.rmtree(folder, ignore_errors=True)


def gather_files(folder: Path) -> None:
    """Copy the files of the other machines' shared folders into the first machine's, in all processes at once."""
    _carry(folder, to_first=True)


def spread_files(folder: Path) -> None:
    """Copy the files of the first machine's shared folder into the other machines', in all processes at once."""
    _carry(folder, to_first=False)


def _carry(folder: Path, to_first: bool) -> None:
    if count() == 1 or count() == _local("WORLD_SIZE"):
        return
    files = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())] if first_here() else None
    held = {rank: files for rank, files in enumerate(_told_all(files)) if files is not None}
    for rank in held:
        if rank:
            source, target = (rank, 0) if to_first else (0, rank)
            for name, size in held[source]:
                _send(folder / name, size, source, target)
    wait()


def _send(path: Path, size: int, source: int, target: int) -> None:
    """Copy a file of `size` bytes from one process's machine to that of another, by way of the processor's memory."""
    if index() == source:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                distributed.send(torch.frombuffer(bytearray(piece), dtype=torch.uint8), target)
    elif index() == target:
        with path.open("wb") as file:
            for start in range(0, size, PIECE):
                part = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
                distributed.recv(part, source)
                file.write(part.numpy().tobytes())


def _told_all(value: Value) -> list[Value]:
    """Return the values of all processes, in their order."""
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def on_device(model: nn.Module) -> Iterator[None]:
    """Hold the model on this process's device within the block, and put it back where it was at its end.

    One whose weights take more than four fifths of a GPU stays where it is: the work needs room too.
    """
    device, before = join(), next(model.parameters()).device
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if device.type == "cuda" and size > 0.8 * torch.cuda.get_device_properties(device).total_memory:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model such that the backward pass averages its gradients over the processes; it begins with the first one's weights."""
    model = model.to(device)
    if count() == 1:
        return model
    # Skipped layers get no gradient, which is an error without this option.
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def unaveraged(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the context in which a backward pass adds to this process's own gradients and averages nothing."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def must_divide(model: nn.Module | None, teacher: nn.Module | None, settings: Optimisation) -> bool:
    """Return True if the processes must divide the weights: as ESPALIER_PARALLEL says, or because a device has no room for all.

    Args:
        model: the model to train; its trained weights have gradients and two states each.
        teacher: a model whose weights are fixed.
        settings: of the training: where its states are, and how small.
    """
    asked = ProcessSettings().parallel
    if count() == 1 or asked in ("ddp", "none"):
        return False
    if asked == "fsdp":
        return True
    # States of 8 bits cannot be divided.
    if not torch.cuda.is_available() or settings.optimizer == "adamw-8bit":
        return False
    each = 2 * settings.weight_size + (0 if settings.offload_optimizer else settings.states_size)
    held = sum(
        weight.numel() * (each if weight.requires_grad else weight.element_size())
        for weight in (model.parameters() if model else ())
    )
    held += sum(weight.numel() * weight.element_size() for weight in (teacher.parameters() if teacher else ()))
    return held > torch.cuda.get_device_properties(0).total_memory / 2


def divided(model: nn.Module, device: torch.device, computed: torch.dtype | None = None) -> nn.Module:
    """Return a copy of the model of which every process holds a part: the weights of a block are gathered while it computes (FSDP2).

    The model itself keeps its weights, where it is. `gathered` returns those of the copy to it.

    Args:
        model: a causal language model, with or without adapters.
        device: of this process.
        computed: the dtype that the blocks' weights are gathered in, as autocast would cast them; their own if None. Gradients are
            averaged in fp32. The stream between the blocks keeps its dtype, as it does under autocast.
    """
    # The copy's weights are the model's own memory until they are divided.
    own = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in model.parameters()}
    copied = copy.deepcopy(model, own)
    mesh = init_device_mesh(device.type, (count(),))
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(copied):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(copied, mesh=mesh, mp_policy=rest, reshard_after_forward=True)
    for module in copied.modules():
        if isinstance(module, FSDPModule):
            # The tensors to gather into are made when it first gathers: in inference mode they would be of no use to a training.
            module.unshard()
            module.reshard()
    return copied


def gathered(copied: nn.Module, model: nn.Module) -> None:
    """Copy the trained weights of a divided copy into the model, in every process."""
    parts = dict(copied.named_parameters())
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = whole(parts[name]).detach().to(weight.device)


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor of which every process holds a part, or the tensor itself if it is not divided. Differentiable."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def inner(model: nn.Module) -> nn.Module:
    """Return the model that `replicated` wrapped, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
