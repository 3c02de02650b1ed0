"""Zero-shot tasks through lm-eval, an optional dependency (`espalier[tasks]`)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scores = dict[str, dict[str, Any]]
"""Task → metric → value, the standard errors beside the metrics."""


class ZeroShot:
    """Tasks of lm-eval; they are found and their data is fetched before any model is measured."""

    def __init__(self, tasks: Sequence[str], limit: int | None = None, seed: int = 0) -> None:
        """Find the tasks.

        Args:
            tasks: names of lm-eval's tasks and groups, or paths of task files (YAML).
            limit: examples for each task; all if None.
            seed: seeds lm-eval's random choices.

        Raises:
            Refusal: lm-eval is not installed, has no such task, or a task's data cannot be fetched.
        """
        self.tasks, self.limit, self.seed = list(tasks), limit, seed
        self._manager = _manager(shipped=not all(Path(task).suffix == ".yaml" for task in tasks))
        for task in self.tasks:
            _load(self._manager, task)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Scores:
        """Return the scores of the model as lm-eval computes them, without examples in the prompt."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=self.tasks,
            num_fewshot=0,
            limit=self.limit,
            log_samples=False,
            task_manager=self._manager,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )
        return {task: _numbers(scores) for task, scores in found["results"].items()}


def _manager(shipped: bool) -> TaskManager:
    """Make lm-eval's index of tasks; without `shipped` it skips its own ten thousand, which take long to list."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise Refusal(
            "evaluate.tasks needs lm-eval, which is not installed: install espalier[tasks], or set evaluate.tasks to []"
        ) from None
    return TaskManager(include_defaults=shipped)


def _load(manager: TaskManager, task: str) -> None:
    try:
        manager.load(task)
    except KeyError:
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lm-eval ls tasks lists them"
        raise Refusal(f"evaluate.tasks names {task!r}, which lm-eval does not know: {hint}") from None
    except OSError as error:  # datasets' ConnectionError is one
        reason = " ".join(str(error).split())[:200]
        raise Refusal(
            f"evaluate.tasks names {task!r}, whose data cannot be fetched ({reason}): fetch it beforehand, or leave the task out"
        ) from None


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of lm-eval, and rename `acc,none` (no filter) to `acc`."""
    return {
        name.removesuffix(",none"): value
        for name, value in scores.items()
        if isinstance(value, int | float) and name not in {"sample_len", "samples"}
    }
