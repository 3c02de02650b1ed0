"""The training loop of regularisation, its controls and recovery, on accelerate.

A step depends only on the settings and its number: its windows, its learning rate and its dropout are functions of the seed and
the step. A checkpoint is therefore the trained weights, the optimizer's state and a step; a resumed training ends with exactly
the weights of an uninterrupted one.

Under `accelerate launch` every process takes its share of each batch (DDP or FSDP); otherwise one process uses the best
device.

Precision. A bf16 weight keeps 8 bits: a step of 1e-4 on a weight of 0.1 is lost in rounding. So `auto` trains fp32 weights
and computes in bf16 by autocast if the hardware does; frozen weights keep their dtype. `bf16` keeps the trained
weights and their gradients in bf16 too, half the memory, for models that would not fit otherwise, at a learning rate that
bf16 can follow. `fp32` computes in fp32 whatever the hardware.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from components.lib.errors import Refusal
from components.lib.recipe.training import Optimisation
from components.lib.training.journal import Checkpoints, Journal
from components.lib.transformer.device import reused_memory

Loss = Callable[[nn.Module, Tensor, int], AbstractContextManager[Mapping[str, Tensor]]]
"""The loss of a step: in `with loss(model, batch, step) as parts`, `parts["loss"]` is minimised and every part is
journalled. It is a context manager because gradient checkpointing runs the layers again in the backward pass: their gates must
stay in place until then."""


Settings = TypeVar("Settings", bound=Optimisation)


class Callback(Protocol):
    """Is called after every step, and may stop the training. Its state is saved in the checkpoints."""

    def after(self, step: int) -> bool:
        """Return True to stop after `step` steps."""

    def state(self) -> dict[str, Tensor]:
        """Return the state to save."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `state` returned."""


def train(
    model: nn.Module,
    windows: Tensor,
    loss: Loss,
    settings: Optimisation,
    *,
    section: str,
    checkpoints: Checkpoints,
    journal: Journal,
    callback: Callback | None = None,
) -> None:
    """Train the parameters of `model` that require a gradient, in place, and leave the model in evaluation mode.

    Afterwards the weights have their original dtype, whatever the precision of the training.

    Args:
        model: the model to train; frozen parameters do not change.
        windows: token ids (windows, length).
        loss: the loss of a step.
        settings: optimizer, batches, precision and checkpoints.
        section: the recipe's section that the settings come from, named in a refusal.
        checkpoints: stores the loop's checkpoints, and gives the newest to resume from.
        journal: takes the loss and its parts, the learning rate and the gradients' norm of every step.
        callback: is called after every step.

    Raises:
        Refusal: the loss or its gradient is not finite, the optimizer is not installed, or the batch cannot be
            divided evenly.
    """
    types = [(weight, weight.dtype) for weight in model.parameters()]
    # Skipped layers get no gradient, which DDP reports as an error without this option.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    loop = _Loop(accelerator, model, settings, section, callback)
    first = loop.resume(checkpoints)
    order = Order(len(windows), settings.batch_size, settings.seed)
    model.train()
    with torch.random.fork_rng(), reused_memory(accelerator.device):
        for step in range(first, settings.steps):
            # Every process draws its own dropout, the same one after a resumption.
            torch.manual_seed(
                (settings.seed * settings.steps + step) * accelerator.num_processes + accelerator.process_index
            )
            parts = loop.step(windows[order.batch(step)], loss, step)
            if accelerator.is_main_process:
                journal.metrics(parts, step + 1)
                journal.progress(step + 1, settings.steps, loss=parts["loss"])
            if callback and callback.after(step + 1):
                break
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                loop.save(checkpoints, step + 1)
            model.train()
    for weight, dtype in types:
        weight.data = weight.data.to(dtype)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_disable()
    model.eval()


class Order:
    """The windows of each step: shuffled again each epoch, and cut into batches that may span two epochs."""

    def __init__(self, windows: int, batch_size: int, seed: int) -> None:
        self.windows, self.batch_size, self.seed = windows, batch_size, seed

    def batch(self, step: int) -> Tensor:
        """Return the indices (batch_size,) of the windows of a step, counted from 0."""
        first = step * self.batch_size
        last = first + self.batch_size - 1
        epochs = range(first // self.windows, last // self.windows + 1)
        start = first - epochs[0] * self.windows
        return torch.cat([self._epoch(epoch) for epoch in epochs])[start : start + self.batch_size]

    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.windows, generator=generator)


def learning_rate(step: int, settings: Optimisation) -> float:
    """Return the learning rate of a step, counted from 0: a linear rise over the warm-up, then a linear fall to 0."""
    warm = round(settings.warmup * settings.steps)
    if settings.learning_rate is None:
        raise ValueError("the learning rate is not set: call `with_learning_rate` first")
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * ((settings.steps - step) / (settings.steps - warm))


def with_learning_rate(settings: Settings, width: int | None) -> Settings:
    """Fill in the learning rate if the recipe gives none.

    Adam's best learning rate falls with the width of the model (arXiv 2203.03466): 0.08 / width is the 2e-5 that TRSP's code has
    for models 4096 wide, and 3e-4 for a model 256 wide.

    Args:
        settings: the settings of a training.
        width: the release's hidden width; None for adapters, whose learning rate does not depend on it.
    """
    if settings.learning_rate is not None:
        return settings
    return settings.model_copy(update={"learning_rate": 1e-4 if width is None else 0.08 / width})


def computes_in_bf16(device: torch.device) -> bool:
    """Return True if the device computes in bf16 natively; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


class _Loop:
    """The parts of a loop that one step, a checkpoint and a resumption share."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        settings: Optimisation,
        section: str,
        callback: Callback | None,
    ) -> None:
        self.accelerator, self.settings, self.section, self.callback = accelerator, settings, section, callback
        self.share = self._share()
        self.autocast = self._set_precision(model)
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.model = accelerator.prepare_model(model)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = accelerator.prepare_optimizer(_optimizer(self.trained, settings, section))

    def _share(self) -> int:
        """Return how many windows a process sees in one forward pass."""
        processes = self.accelerator.num_processes
        whole = self.settings.micro_batch_size or self.settings.batch_size // processes
        if self.settings.batch_size % (processes * max(whole, 1)):
            raise Refusal(
                f"{self.section}.batch_size is {self.settings.batch_size}, which {processes} processes with {whole} windows "
                f"a forward pass cannot share evenly: make it a multiple of {processes * max(whole, 1)}"
            )
        return whole

    def _set_precision(self, model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        """Cast the weights to the dtypes of the precision, and return the context to compute in."""
        device, precision = self.accelerator.device, self.settings.precision
        bf16 = precision == "bf16" or (precision == "auto" and computes_in_bf16(device))
        trained = torch.bfloat16 if precision == "bf16" else torch.float32
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(trained)
            elif not bf16:
                weight.data = weight.data.float()
        return (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext

    def step(self, batch: Tensor, loss: Loss, step: int) -> dict[str, float]:
        """Take one optimizer step on a batch (batch_size, length); return the loss's parts, the rate and the norm."""
        rate = learning_rate(step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micros = self._micros(batch)
        total: dict[str, Tensor] = {}
        for number, micro in enumerate(micros, 1):
            last = number == len(micros)
            sync = nullcontext() if last else self.accelerator.no_sync(self.model)
            with sync, self.autocast(), loss(self.model, micro, step) as parts:
                self.accelerator.backward(parts["loss"] / len(micros))
            for name, part in parts.items():
                total[name] = total.get(name, torch.zeros_like(part)) + part.detach() / len(micros)
        norm = self.accelerator.clip_grad_norm_(self.trained, self.settings.clip)
        values = {name: self.accelerator.reduce(part, "mean").item() for name, part in total.items()}
        self._refuse_unless_finite(values["loss"], float(norm), step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return values | {"learning_rate": rate, "gradient_norm": float(norm)}

    def _micros(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return this process's part of the batch, split into micro-batches of one forward pass."""
        mine = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        return mine.long().to(self.accelerator.device).split(self.share)

    def _refuse_unless_finite(self, loss: float, norm: float, step: int) -> None:
        """Raise before the optimizer spreads a value that is not finite into the weights."""
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not torch.isfinite(torch.tensor(value)):
                raise Refusal(
                    f"the {name} is {value} at step {step + 1} of {self.settings.steps} with {self.section}.learning_rate "
                    f"{self.settings.learning_rate:g}: lower it (the last good checkpoint is kept)"
                )

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Keep the trained weights, the optimizer's state and the callback's as the checkpoint of `step`.

        Every process writes its own shards, as safetensors: the default writer of torch.distributed.checkpoint stores the metadata
        as a pickle, which is never loaded here. The processes of one machine share the folder.
        """
        tensors, groups = self._state()
        with self._shared_folder() as folder:
            with _quiet():
                dcp.save(
                    tensors,
                    storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                    no_dist=self.accelerator.num_processes == 1,
                )
            if self.accelerator.is_main_process:
                if self.callback:
                    save_file(self.callback.state(), folder / "callback.safetensors")
                (folder / "state.json").write_text(json.dumps({"groups": groups}))
                checkpoints.save(folder, step)
            self.accelerator.wait_for_everyone()

    def resume(self, checkpoints: Checkpoints) -> int:
        """Load the newest checkpoint, and return the number of its steps: 0 if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            step = checkpoints.latest(Path(folder))
            if step is None:
                return 0
            held = load_file(Path(folder) / "callback.safetensors") if self.callback else {}
            (Path(folder) / "callback.safetensors").unlink(missing_ok=True)
            tensors, _ = self._state()
            with _quiet():
                dcp.load(
                    tensors,
                    storage_reader=HuggingFaceStorageReader(folder),
                    no_dist=self.accelerator.num_processes == 1,
                )
            groups = json.loads((Path(folder) / "state.json").read_text())["groups"]
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=_of("model", tensors),
            optim_state_dict={"state": _nested(_of("optimizer", tensors)), "param_groups": groups},
            options=_options(),
        )
        if self.callback:
            self.callback.restore(held)
        return step

    def _state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Return this process's part of the trained weights and the optimizer's state, and the optimizer's groups."""
        weights, state = get_state_dict(self.model, self.optimizer.optimizer, options=_options())
        tensors = dict(_under("model", weights)) | dict(_under("optimizer", _flat(state["state"])))
        return dict(_unshared(tensors)), state["param_groups"]

    @contextmanager
    def _shared_folder(self) -> Iterator[Path]:
        """Yield the same empty folder in every process, and remove it at the end."""
        made = [tempfile.mkdtemp(prefix="espalier-") if self.accelerator.is_main_process else ""]
        folder = Path(broadcast_object_list(made)[0])
        try:
            yield folder
        finally:
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warning that a single process saves, which is intended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _options() -> StateDictOptions:
    """Return options for state dicts on the CPU: only the process's own shards of trained weights, the optimizer's state by weight name."""
    return StateDictOptions(cpu_offload=True, ignore_frozen_params=True, strict=False)


def _unshared(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tied weights only once: safetensors stores no memory twice, and the model ties them again."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor.contiguous()


def _under(part: str, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{part}:{name}", tensor) for name, tensor in tensors.items())


def _of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name.removeprefix(f"{part}:"): value for name, value in tensors.items() if name.startswith(f"{part}:")}


def _flat(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Turn weight → name → tensor into weight:name → tensor."""
    return {f"{weight}:{name}": value for weight, values in state.items() for name, value in values.items()}


def _nested(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Turn weight:name → tensor into weight → name → tensor."""
    nested: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        weight, name = key.rsplit(":", 1)
        nested.setdefault(weight, {})[name] = value
    return nested


def _optimizer(weights: list[nn.Parameter], settings: Optimisation, section: str) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        # On a GPU torch would else step all weights at once, with a temporary copy of a whole state: a quarter more memory.
        return torch.optim.AdamW(weights, fused=weights[0].is_cuda or None, **arguments)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError:
        raise Refusal(
            f"{section}.optimizer is adamw-8bit, which bitsandbytes has, and it is not installed: "
            "pip install bitsandbytes, or take adamw"
        ) from None
    return bitsandbytes.optim.AdamW8bit(weights, **arguments)
