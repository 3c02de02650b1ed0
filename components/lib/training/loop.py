"""The training loop of regularisation, its controls and recovery.

A step depends only on the settings and its number: its windows, its learning rate and its dropout are functions of the seed and
the step. A checkpoint is therefore the trained weights, the optimizer's state and a step; a resumed training ends with exactly
the weights of an uninterrupted one.

Several processes share each batch (`components.lib.training.ranks`): the losses and the gradients are means over the whole batch, however
it is divided.

Precision. A bf16 weight keeps 8 bits: a step of 1e-4 on a weight of 0.1 is lost in rounding. So `auto` trains fp32 weights
and computes in bf16 by autocast if the hardware does; frozen weights keep their dtype. `bf16` keeps the trained
weights, their gradients and the optimizer's states in bf16 too, half the memory, for models that would not fit otherwise: weights
are rounded at random, so that on average no step is lost (`components.lib.training.adamw`). `fp32` computes in fp32 whatever the hardware.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from components.lib.errors import Refusal
from components.lib.recipe.training import Optimisation
from components.lib.training import ranks
from components.lib.training.adamw import AdamW
from components.lib.training.journal import Checkpoints, Journal
from components.lib.training.micro import most_windows
from components.lib.training.windows import Order, Windows
from components.lib.transformer.device import computes_in_bf16, reused_memory

Loss = Callable[[nn.Module, Tensor, int], AbstractContextManager[Mapping[str, Tensor]]]
"""The loss of a step: in `with loss(model, batch, step) as parts`, `parts["loss"]` is minimised and every part is
journalled. It is a context manager because gradient checkpointing runs the layers again in the backward pass: their gates must
stay in place until then."""


Settings = TypeVar("Settings", bound=Optimisation)


class Callback(Protocol):
    """Is called before the first step and after every one, and may stop the training. Its state is saved in the checkpoints."""

    def after(self, step: int, model: nn.Module) -> bool:
        """Return True to stop after `step` steps, 0 before the first one. `model` is the one that the loss is given."""

    def state(self) -> dict[str, Tensor]:
        """Return the state to save."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `state` returned."""


def train(
    model: nn.Module,
    windows: Tensor | Windows,
    loss: Loss,
    settings: Optimisation,
    *,
    section: str,
    checkpoints: Checkpoints,
    journal: Journal,
    callback: Callback | None = None,
    divided: bool = False,
) -> None:
    """Train the parameters of `model` that require a gradient, in place, and leave the model in evaluation mode.

    Afterwards the weights have their original dtype, whatever the precision of the training.

    Args:
        model: the model to train; frozen parameters do not change.
        windows: token ids (windows, length), in memory or in files.
        loss: the loss of a step.
        settings: optimizer, batches, precision and checkpoints.
        section: the recipe's section that the settings come from, named in a refusal.
        checkpoints: stores the loop's checkpoints, and gives the newest to resume from.
        journal: takes the loss and its parts, the learning rate and the gradients' norm of every step.
        callback: is called after every step.
        divided: whether the processes divide the weights; the model must then be called through the loss's argument alone.

    Raises:
        Refusal: the loss or its gradient is not finite, or another optimizer wrote the checkpoint.
        ValueError: the processes divide the weights, and the optimizer has states of 8 bits.
    """
    types = [(weight, weight.dtype) for weight in model.parameters()]
    loop = _Loop(model, settings, section, callback, divided)
    first = loop.resume(checkpoints)
    order = Order(windows, settings.batch_size, settings.seed)
    if callback and first == 0:
        callback.after(0, loop.model)
    loop.model.train()
    with torch.random.fork_rng(), reused_memory(loop.device):
        if settings.micro_batch_size == "auto" and first < settings.steps:
            loop.find_micro(windows[order.batch(first)], loss, first)
        for step in range(first, settings.steps):
            # Every process draws its own dropout, the same one after a resumption.
            torch.manual_seed((settings.seed * settings.steps + step) * ranks.count() + ranks.index())
            parts = loop.step(windows[order.batch(step)], loss, step)
            if ranks.first():
                journal.metrics(parts, step + 1)
                journal.progress(step + 1, settings.steps, loss=parts["loss"])
            if callback and callback.after(step + 1, loop.model):
                break
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                loop.save(checkpoints, step + 1)
            loop.model.train()
    if divided:
        ranks.gathered(loop.model, model)
    for weight, dtype in types:
        weight.data = weight.data.to(dtype)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_disable()
    model.eval()


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


def autocast(device: torch.device, precision: str, cache: bool = True) -> AbstractContextManager[Any]:
    """Return the context in which a model computes on the device as `precision` says: in bf16, or as its weights are.

    Args:
        device: of the model.
        precision: that of a training.
        cache: whether the weights that are cast are kept until the end of the context.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_bf16(device, precision), cache_enabled=cache)


def _bf16(device: torch.device, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and computes_in_bf16(device))


class _Loop:
    """The parts of a loop that one step, a checkpoint and a resumption share."""

    def __init__(
        self, model: nn.Module, settings: Optimisation, section: str, callback: Callback | None, divided: bool
    ) -> None:
        self.device = ranks.join()
        self.settings, self.section, self.callback, self.divided = settings, section, callback, divided
        bf16 = self._set_precision(model)
        # A block's gathered weights are freed when it is computed; autocast would keep what it casts of the others.
        self.autocast = lambda: autocast(self.device, settings.precision, cache=not divided)
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if divided:
            self.model = ranks.divided(model, self.device, torch.bfloat16 if bf16 else None)
        else:
            self.model = ranks.replicated(model, self.device)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = _optimizer(self.trained, settings)
        self.micro = settings.surely_fits

    def _set_precision(self, model: nn.Module) -> bool:
        """Cast the weights to the dtypes of the precision, and return whether it computes in bf16."""
        device, precision = self.device, self.settings.precision
        bf16 = _bf16(device, precision)
        trained = torch.bfloat16 if precision == "bf16" else torch.float32
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(trained)
            elif not bf16:
                weight.data = weight.data.float()
        return bf16

    def step(self, batch: Tensor, loss: Loss, step: int) -> dict[str, float]:
        """Take one optimizer step on a batch (batch_size, length); return the loss's parts, the rate and the norm."""
        rate = learning_rate(step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micros = self._micros(batch)
        total: dict[str, Tensor] = {}
        for number, (micro, weight) in enumerate(micros, 1):
            average = nullcontext() if number == len(micros) else ranks.unaveraged(self.model)
            with average, self.autocast(), loss(self.model, micro, step) as parts:
                # The gradients are averaged over the processes, and the whole batch's is a sum.
                (parts["loss"] * (weight * ranks.count())).backward()
            for name, part in parts.items():
                total[name] = total.get(name, torch.zeros_like(part)) + part.detach() * weight
        norm = float(ranks.whole(nn.utils.clip_grad_norm_(self.trained, self.settings.clip)))
        whole = ranks.summed(torch.stack([part.float() for part in total.values()]))
        values = dict(zip(total, whole.tolist(), strict=True))
        self._refuse_unless_finite(values["loss"], norm, step)
        # Every process rounds weights of bf16 alike, or copies of the model would drift apart.
        torch.manual_seed(self.settings.seed * self.settings.steps + step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        found = {"micro_batch_size": float(self.micro)} if self.settings.micro_batch_size == "auto" else {}
        return values | {"learning_rate": rate, "gradient_norm": norm} | found

    def find_micro(self, batch: Tensor, loss: Loss, step: int) -> None:
        """Find the micro batch `auto` on a batch (batch_size, length), the same for all processes; nothing is learnt from it.

        Processes that divide the weights wait for each other in every pass, so that one of them cannot fail alone: they take 1.
        """
        if self.divided:
            return
        # Not the one that averages: the processes may try in different numbers.
        model = ranks.inner(self.model)

        def work(windows: int) -> None:
            with self.autocast(), loss(model, batch[:windows].long().to(self.device), step) as parts:
                parts["loss"].backward()

        elsewhere = self.optimizer.state or (self.settings.offload_optimizer and self.device.type == "cuda")
        states = 0 if elsewhere else self.settings.states_size * sum(weight.numel() for weight in self.trained)
        found = most_windows(work, -(-len(batch) // ranks.count()), self.device, states)
        self.optimizer.zero_grad()
        self.micro = ranks.least(found)

    def _micros(self, batch: Tensor) -> list[tuple[Tensor, float]]:
        """Return this process's part of a batch (batch_size, length), in parts of one forward pass with their weight in the mean.

        All processes make as many passes, since they wait for each other: one whose windows are used up reads one again with a weight of 0.
        """
        largest = -(-len(batch) // ranks.count())  # of the processes' parts
        size = min(self.micro, largest)
        mine = ranks.share(batch).long().to(self.device)
        parts = [mine[start : start + size] for start in range(0, largest, size)]
        spare = batch[:1].long().to(self.device)
        return [(part, len(part) / len(batch)) if len(part) else (spare, 0.0) for part in parts]

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
        as a pickle, which is never loaded here. The processes of one machine share the folder; the shards of other machines are brought to it.
        """
        tensors, groups = self._state()
        with ranks.shared_folder() as folder:
            with _quiet():
                dcp.save(
                    tensors,
                    storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                    no_dist=ranks.count() == 1,
                )
            ranks.gather_files(folder)
            if ranks.first():
                if self.callback:
                    save_file(self.callback.state(), folder / "callback.safetensors")
                (folder / "state.json").write_text(json.dumps({"groups": groups, "optimizer": self.settings.optimizer}))
                checkpoints.save(folder, step)

    def resume(self, checkpoints: Checkpoints) -> int:
        """Load the newest checkpoint, and return the number of its steps: 0 if there is none.

        Another number of processes may have written it.

        Raises:
            Refusal: another optimizer wrote it: its states are other numbers under the same names.
        """
        with ranks.shared_folder() as folder:
            step, held = ranks.told(self._fetch(checkpoints, folder) if ranks.first() else (None, {}))
            if step is None:
                return 0
            ranks.spread_files(folder)
            state = json.loads((folder / "state.json").read_text())
            if state["optimizer"] != self.settings.optimizer:
                raise Refusal(
                    f"{self.section}.optimizer is {self.settings.optimizer}, and the checkpoint of step {step} was written by "
                    f"{state['optimizer']}: set {self.section}.optimizer to {state['optimizer']}, or delete the checkpoint"
                )
            reader = HuggingFaceStorageReader(str(folder))
            # A weight that never had a gradient has no state: those of layers that are skipped from the first step.
            written = reader.read_metadata().state_dict_metadata
            tensors = {
                name: tensor
                for name, tensor in self._state()[0].items()
                if name in written or not name.startswith("optimizer:")
            }
            with _quiet():
                dcp.load(tensors, storage_reader=reader, no_dist=ranks.count() == 1)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=_of("model", tensors),
            optim_state_dict={"state": _nested(_of("optimizer", tensors)), "param_groups": state["groups"]},
            options=_options(),
        )
        if self.callback:
            self.callback.restore(held)
        return step

    def _fetch(self, checkpoints: Checkpoints, folder: Path) -> tuple[int | None, dict[str, Tensor]]:
        """Put the newest checkpoint into the folder, and return its step and the callback's state."""
        step, held = checkpoints.latest(folder), {}
        if step is not None and self.callback:
            held = load_file(folder / "callback.safetensors")
            (folder / "callback.safetensors").unlink()  # it is no shard
        return step, held

    def _state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Return this process's part of the trained weights and the optimizer's state, and the optimizer's groups."""
        weights, state = get_state_dict(self.model, self.optimizer, options=_options())
        tensors = dict(_under("model", weights)) | dict(_under("optimizer", _flat(state["state"])))
        return dict(_unshared(tensors)), state["param_groups"]


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
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if held.numel() == 0 or held.data_ptr() not in seen:
            seen.add(held.data_ptr())
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


def _optimizer(weights: list[nn.Parameter], settings: Optimisation) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw" and not settings.offload_optimizer and weights[0].dtype != torch.bfloat16:
        # On a GPU torch would else step all weights at once, with a temporary copy of a whole state: a quarter more memory.
        return torch.optim.AdamW(weights, fused=weights[0].is_cuda or None, **arguments)
    eight_bits = settings.optimizer == "adamw-8bit"
    return AdamW(weights, eight_bits=eight_bits, offload=settings.offload_optimizer, **arguments)
