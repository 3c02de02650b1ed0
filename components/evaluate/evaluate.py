"""Measure every model of a run in one process and one environment: quality, size, speed.

The dense model and the candidate are measured on the same texts and windows and on the same machine; the context records them.
"""

from __future__ import annotations

import gc
import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from components.evaluate.context import machine
from components.evaluate.continuations import questions, write_task
from components.evaluate.prompts import continue_prompts
from components.evaluate.served import measure_served
from components.evaluate.speed import measure_speed, peak_memory, prefill_flops, prompt_batch
from components.evaluate.zero_shot import Scores, zero_shot
from components.lib import vllm
from components.lib.errors import Refusal
from components.lib.recipe.schema import Evaluate
from components.lib.tasks.load import Loaded, load_tasks
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import Checkpoint, load_model, load_tokenizer, require_loadable
from components.lib.transformer.device import best_device, raise_weights
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.text import (
    SEPARATOR,
    consecutive_windows,
    read_documents,
    text_file,
    token_stream,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE = "dense"
"""The model whose tokenizer turns the texts into tokens for all models."""
SEED = 0
PROBE = 20_000
"""Characters of each text on which a model's tokenizer is compared with the reference's."""
TOGETHER = 0.25
"""All models are timed in turns if their weights take at most this part of the free memory; caches and activations need the rest."""


def evaluate(
    models: Mapping[str, Path],
    texts: Mapping[str, Path],
    tasks: Mapping[str, Path] | None = None,
    *,
    evaluate: Evaluate,
    out: Path,
    journal: Journal,
    model_digests: Mapping[str, str] | None = None,
    text_digests: Mapping[str, str] | None = None,
) -> None:
    """Measure the models and leave `evaluation.json`.

    It holds `models` (name → parameters, bytes, layers, widths, dtype, perplexity, tasks, continued, speed, prefill_flops, peak_memory, notes) and the
    `context` of the numbers. The layers and widths of a model of an unknown family may be null. A number that is not finite is
    null, and a note gives it. Bytes are those of the stored weights; prefill_flops are those of one sequence of `speed.prompt`
    tokens; peak_memory is that of the largest batch.

    Args:
        models: folders with a checkpoint in `model/`, by name: dense (always), candidate, champion, pruned-first, dense-trained.
        texts: a folder with one text file, or the file, for each name in `evaluate.perplexity`.
        tasks: the folder of collected task files for each of them in `evaluate.tasks`.
        evaluate: the recipe's section, with its length set.
        out: an empty folder.
        journal: takes the progress, in tokens, and each perplexity.
        model_digests: models with the same digest are measured once.
        text_digests: kept in the context.

    Raises:
        Refusal: a text or a task that cannot be measured, or a checkpoint that cannot be opened; all of it before
            anything is measured.
    """
    twins = _twins(models, model_digests or {})
    opened = {name: EvaluatedModel.open(name, models[name] / "model") for name in dict.fromkeys(twins.values())}
    tokenized = {name: _tokenize(folder, name, opened[REFERENCE], evaluate) for name, folder in texts.items()}
    together = _fit_together(opened.values())
    with _loaded_tasks(evaluate, texts, tasks or {}) as loaded:
        tokens = _tokens_per_model(tokenized, len(loaded["tasks"]), evaluate)
        progress = Progress(journal, len(opened) * tokens)
        measured = {
            name: _quality(evaluated, tokenized, loaded, evaluate, progress) for name, evaluated in opened.items()
        }
    for group in _groups(opened, together) if evaluate.speed.enabled else ():
        for name, figures in _speed(group, tokenized, evaluate, progress).items():
            measured[name] |= figures
    context = _context(evaluate, tokenized, text_digests or {}, together)
    _save({"models": {name: measured[twin] for name, twin in twins.items()}, "context": context}, out)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to measure."""

    name: str
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    size: Mapping[str, Any]
    """Its size as its headers declare it, by the names in `evaluation.json`."""

    @classmethod
    def open(cls, name: str, folder: Path) -> EvaluatedModel:
        """Open a checkpoint's headers and its tokenizer. Raises Refusal if it cannot be read, or its parameters not be counted."""
        checkpoint = Checkpoint.open(folder)
        require_loadable(folder)
        size = {
            "parameters": checkpoint.parameters,
            "bytes": checkpoint.bytes,
            "layers": checkpoint.layers,
            "widths": asdict(checkpoint.widths) if checkpoint.widths else None,
            "dtype": checkpoint.dtype,
        }
        return cls(name, checkpoint, load_tokenizer(folder), size)

    def load(self) -> PreTrainedModel:
        """Load the model onto the device, in the dtype it is stored in, after freeing the memory of models that are no longer referenced."""
        gc.collect()
        return load_model(self.checkpoint.folder, device=best_device())


@dataclass(frozen=True)
class TokenizedText:
    """A text in the tokens of the reference's tokenizer."""

    probe: str
    """Its first characters."""
    windows: Tensor
    """(N, length)."""
    probed: Tensor
    """The tokens of the probe."""

    def is_tokenized_alike_by(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return True if another tokenizer gives the same tokens for the probe."""
        return torch.equal(token_stream([self.probe], tokenizer), self.probed)


class Progress:
    """Counts tokens and reports them to the journal."""

    def __init__(self, journal: Journal, total: int) -> None:
        """Start at 0 of `total` tokens."""
        self.journal, self.total, self.tokens = journal, total, 0

    def advance(self, tokens: int) -> None:
        """Add `tokens` to the count."""
        self.tokens += tokens
        self.journal.progress(self.tokens, self.total)


def _twins(models: Mapping[str, Path], digests: Mapping[str, str]) -> dict[str, str]:
    """Return for each model the first model with the same digest, or itself if it is the first."""
    first: dict[str, str] = {}
    return {name: first.setdefault(digests.get(name, f"only {name}"), name) for name in models}


def _tokenize(folder: Path, name: str, reference: EvaluatedModel, evaluate: Evaluate) -> TokenizedText:
    if evaluate.length is None:
        raise Refusal("evaluate.length is not set: set it to the tokens of a window, such as 2048")
    documents = _documents(folder, name, evaluate)
    windows = consecutive_windows(token_stream(documents, reference.tokenizer), evaluate.length)
    probe = SEPARATOR.join(documents)[:PROBE]
    return TokenizedText(probe, windows, token_stream([probe], reference.tokenizer))


@contextmanager
def _loaded_tasks(evaluate: Evaluate, texts: Mapping[str, Path], folders: Mapping[str, Path]) -> Iterator[Loaded]:
    """Yield the recipe's tasks, and those made of its texts; their data is in a temporary folder."""
    if not evaluate.tasks and not evaluate.continuations:
        yield {"tasks": {}, "groups": {}}
        return
    with tempfile.TemporaryDirectory(prefix="espalier-tasks-") as scratch:
        made = [
            write_task(
                f"continue_{name}",
                questions(_documents(texts[name], name, evaluate), evaluate.continuations, SEED),
                Path(scratch),
            )
            for name in texts
            if evaluate.continuations
        ]
        yield load_tasks(evaluate.named_tasks, list(folders.values()), made, evaluate.remote_code)


def _documents(folder: Path, name: str, evaluate: Evaluate) -> list[str]:
    return read_documents(text_file(folder), evaluate.perplexity[name].field)


def _tokens_per_model(tokenized: Mapping[str, TokenizedText], tasks: int, evaluate: Evaluate) -> int:
    """Return the work on one model in tokens, read and written; a task counts as many as the texts together."""
    texts = sum(text.windows.numel() for text in tokenized.values())
    passes = _tokens_of_speed(evaluate) if evaluate.speed.enabled else 0
    return texts * (1 + tasks) + passes


def _tokens_of_speed(evaluate: Evaluate) -> int:
    """Return the tokens that the speed of one model takes, warm-up included."""
    speed = evaluate.speed
    return (speed.repeats + 1) * sum(speed.batches) * (speed.prompt + speed.generate)


def _quality(
    evaluated: EvaluatedModel,
    tokenized: Mapping[str, TokenizedText],
    tasks: Loaded,
    evaluate: Evaluate,
    progress: Progress,
) -> dict[str, Any]:
    """Measure everything of a model but its speed."""
    model = evaluated.load()
    raise_weights(model)  # the speed is measured later, in the types that are stored
    perplexities, notes = _perplexities(evaluated, model, tokenized, evaluate.batch_size, progress)
    scores = _scores(evaluated, model, tasks, evaluate, progress.journal)
    progress.advance(len(tasks["tasks"]) * sum(text.windows.numel() for text in tokenized.values()))
    return {
        **evaluated.size,
        "perplexity": perplexities,
        "tasks": scores,
        "continued": continue_prompts(model, evaluated.tokenizer, evaluate.prompts),
        "speed": {"prefill": {}, "decode": {}},
        "notes": notes,
    }


def _scores(
    evaluated: EvaluatedModel, model: PreTrainedModel, tasks: Loaded, evaluate: Evaluate, journal: Journal
) -> Scores:
    """Return the scores by task, and log them."""
    if not tasks["tasks"]:
        return {}
    scores = zero_shot(
        tasks, model, evaluated.tokenizer, batch_size=evaluate.batch_size, limit=evaluate.task_limit, seed=SEED
    )
    for task, metrics in scores.items():
        # MLflow takes few signs in a name, and lm-eval puts a comma before the name of a filter.
        names = {metric: re.sub(r"[^\w./ -]", "-", f"{evaluated.name}.{task}.{metric}") for metric in metrics}
        journal.metrics({names[metric]: value for metric, value in metrics.items()}, step=0)
    return scores


def _perplexities(
    evaluated: EvaluatedModel,
    model: PreTrainedModel,
    tokenized: Mapping[str, TokenizedText],
    batch_size: int,
    progress: Progress,
) -> tuple[dict[str, float | None], list[str]]:
    """Return the perplexity by text, and a note for each that is missing or not finite."""
    found: dict[str, float | None] = {}
    notes = []
    for name, text in tokenized.items():
        reason = _incomparable(evaluated, text)
        if reason:
            found[name] = None
            notes.append(f"perplexity on {name} is not comparable: {reason}")
            progress.advance(text.windows.numel())
            continue
        value = perplexity(model, text.windows, batch_size, done=progress.advance)
        found[name] = value
        progress.journal.metrics({f"{evaluated.name}.perplexity.{name}": value}, step=0)
        if not math.isfinite(value):
            notes.append(f"perplexity on {name} is {value}")
    return found, notes


def _incomparable(evaluated: EvaluatedModel, text: TokenizedText) -> str:
    """Return why a model cannot be measured on a text as the dense model is; empty if it can."""
    longest, length = evaluated.checkpoint.longest_context, text.windows.shape[1]
    if longest is not None and length > longest:
        return f"the model reads {longest} tokens at most, and a window has {length}"
    if not text.is_tokenized_alike_by(evaluated.tokenizer):
        # A mean over other tokens is another quantity: no ratio of the two means anything.
        return "the tokenizer differs from the dense model's"
    return ""


def _fit_together(opened: Iterable[EvaluatedModel]) -> bool:
    weights = sum(evaluated.checkpoint.bytes for evaluated in opened)
    free = torch.cuda.mem_get_info()[0] if best_device().type == "cuda" else psutil.virtual_memory().available
    return weights <= TOGETHER * free


def _groups(opened: Mapping[str, EvaluatedModel], together: bool) -> list[dict[str, EvaluatedModel]]:
    """Return one group of all models, or a group for each model if their weights do not fit in memory together."""
    return [dict(opened)] if together else [{name: evaluated} for name, evaluated in opened.items()]


def _speed(
    group: Mapping[str, EvaluatedModel], tokenized: Mapping[str, TokenizedText], evaluate: Evaluate, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Measure the speed of a group of models in turns."""
    tokens = next(iter(tokenized.values())).windows.flatten()
    length = evaluate.speed.length
    longest = {name: evaluated.checkpoint.longest_context for name, evaluated in group.items()}
    fitting = {name: evaluated for name, evaluated in group.items() if (longest[name] or length) >= length}
    progress.advance((len(group) - len(fitting)) * _tokens_of_speed(evaluate))
    group = fitting
    if evaluate.speed.backend == "vllm":
        checkpoints = {name: evaluated.checkpoint for name, evaluated in group.items()}
        figures = measure_served(checkpoints, evaluate.speed, done=progress.advance)
    models = {name: evaluated.load() for name, evaluated in group.items()}
    if evaluate.speed.backend == "transformers":
        figures = measure_speed(models, evaluate.speed, tokens, done=progress.advance)
    flops = {name: prefill_flops(model, evaluate.speed.prompt) for name, model in models.items()}
    largest = prompt_batch(tokens, max(evaluate.speed.batches), evaluate.speed.prompt)
    peaks = {name: peak_memory(model, largest) for name, model in models.items()}
    return {name: {"speed": figures[name], "prefill_flops": flops[name], "peak_memory": peaks[name]} for name in group}


def _context(
    evaluate: Evaluate, tokenized: Mapping[str, TokenizedText], digests: Mapping[str, str], together: bool
) -> dict[str, Any]:
    """Return the data, the settings and the machine of the numbers."""
    here = machine()
    if evaluate.speed.enabled and evaluate.speed.backend == "vllm":
        here["versions"]["vllm"] = vllm.installed()[1]
    return {
        "length": evaluate.length,
        "tokens": {name: text.windows.numel() for name, text in tokenized.items()},
        "digests": dict(digests),
        "batch_size": evaluate.batch_size,
        "seed": SEED,
        "task_limit": evaluate.task_limit,
        "speed": evaluate.speed.model_dump(mode="json") | {"interleaved": together},
        **here,
    }


def _save(result: dict[str, Any], out: Path) -> None:
    (out / "evaluation.json").write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has neither, and no rule may pass because of one."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
