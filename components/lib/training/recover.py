"""LoRA recovery fine-tuning (RFT): train adapters on the pruned model, keep the best, merge them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.recipe.training import Recover
from components.lib.training import loop, lora, ranks
from components.lib.training.journal import Checkpoints, Journal, NoCheckpoints, Silent
from components.lib.training.objective import lm_loss
from components.lib.training.windows import Windows
from components.lib.transformer.perplexity import perplexity


def recover(
    model: PreTrainedModel,
    windows: Tensor,
    settings: Recover,
    *,
    training: Tensor | Windows | None = None,
    checkpoints: Checkpoints | None = None,
    journal: Journal | None = None,
    adapter: Path | None = None,
) -> PreTrainedModel:
    """Train adapters on a part of the windows, stop early by the held-out rest, and return the model with the best adapters merged.

    The best adapters may be the untrained ones, so recovery never makes the perplexity on the held-out part worse.

    Args:
        model: the pruned model, changed in place.
        windows: token ids (windows, length), a part of which is held out.
        settings: adapters, optimisation and early stopping.
        training: other windows to train on; None or `windows` itself to train on the part that is not held out.
        checkpoints: stores the training's checkpoints.
        journal: takes the loss, and the held-out perplexity as `validation`.
        adapter: the folder to write the best adapters into, in peft's form; not written if it is None.

    Raises:
        Refusal: there are too few windows to hold some out, or the loss is not finite.
    """
    settings = loop.with_learning_rate(settings, width=None)
    rest, held_out = split(windows, settings)
    journal = journal or Silent()
    trained = lora.adapted(model, settings.lora, settings.seed)
    stopping = EarlyStopping(trained, held_out, settings, journal)
    loop.train(
        trained,
        rest if training is None or training is windows else training,
        _loss,
        settings,
        section="recover",
        checkpoints=checkpoints or NoCheckpoints(),
        journal=journal,
        callback=stopping,
        divided=ranks.must_divide(trained, None, settings),
    )
    stopping.put_back_best()
    if adapter and ranks.first():
        lora.save_adapters(trained, adapter)
    return lora.merged(trained)


def split(windows: Tensor, settings: Recover) -> tuple[Tensor, Tensor]:
    """Hold out a part of the windows, drawn from the seed. Raises Refusal if one of the two parts is empty."""
    count = round(settings.validation * len(windows))
    if not 0 < count < len(windows):
        raise Refusal(
            f"recover.validation {settings.validation} of {len(windows)} windows holds out {count}: "
            "raise calibration.samples or change recover.validation"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))
    return windows[order[count:]], windows[order[:count]]


class EarlyStopping:
    """Measures the held-out perplexity every few steps, keeps the best adapters, and stops when patience runs out."""

    def __init__(self, trained: PeftModel, held_out: Tensor, settings: Recover, journal: Journal) -> None:
        self.trained, self.held_out, self.settings, self.journal = trained, held_out, settings, journal
        self.best = float("inf")
        self.measured_since = 0
        self.adapters: dict[str, Tensor] = {}

    def after(self, step: int, model: nn.Module) -> bool:
        """Measure every `evaluate_every` steps; return whether to stop."""
        if step % self.settings.evaluate_every and step != self.settings.steps:
            return False
        self._measure(step, ranks.inner(model))
        return self.measured_since >= self.settings.patience

    def _measure(self, step: int, model: Any) -> None:
        model.eval()
        # The first process decides, so that all stop at once.
        value = ranks.told(perplexity(model, self.held_out, self.settings.surely_fits))
        self.journal.metrics({"validation": value}, step)
        self.measured_since += 1
        if value < self.best:
            self.best, self.measured_since = value, 0
            adapters = get_peft_model_state_dict(model)
            self.adapters = {name: ranks.whole(weight).detach().clone() for name, weight in adapters.items()}

    def put_back_best(self) -> None:
        """Load the adapters with the lowest held-out perplexity into the model."""
        set_peft_model_state_dict(self.trained, self.adapters)

    def state(self) -> dict[str, Tensor]:
        """Return the best adapters, their perplexity and the number of measurements since."""
        progress = torch.tensor([self.best, self.measured_since], dtype=torch.float64)
        return {"progress": progress} | {f"adapters.{name}": weight for name, weight in self.adapters.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `state` returned."""
        self.best, self.measured_since = state["progress"][0].item(), int(state["progress"][1])
        self.adapters = {name.removeprefix("adapters."): weight for name, weight in state.items() if name != "progress"}


@contextmanager
def _loss(model: nn.Module, batch: Tensor, step: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield the LM loss, the mean over every token of the batch (batch, length)."""
    logits = model(input_ids=batch, use_cache=False).logits
    yield {"loss": lm_loss(logits, batch)}
