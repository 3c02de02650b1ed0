"""Zero-shot tasks: lm-eval asks the questions and scores the answers, without examples in the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from components.lib.tasks.load import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scores = dict[str, dict[str, float]]
"""Task → metric → value, the standard errors beside the metrics."""


def zero_shot(
    tasks: Loaded,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
) -> Scores:
    """Return the scores of the model as lm-eval computes them.

    A group that has metrics of its own stands for its tasks.

    Args:
        tasks: as `load_tasks` returns them.
        model: in evaluation mode; it computes in the dtype that it is loaded in.
        tokenizer: the model's own.
        batch_size: sequences a forward pass.
        limit: the first so many examples of each task; all if None.
        seed: seeds lm-eval's random choices.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import set_torch_seed

    set_torch_seed(seed)
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    found = evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        task_dict=tasks,
        limit=limit,
        log_samples=False,
    )
    numbers = {name: _numbers(scores) for name, scores in found["results"].items()}
    stand_for = {child for name, group in tasks["groups"].items() if numbers.get(name) for child in _below(group)}
    return {name: scores for name, scores in numbers.items() if scores and name not in stand_for}


def _below(group: Any) -> set[str]:
    """Return the names of everything in a group."""
    return {task.task_name for task in group.get_all_tasks()} | {inner.name for inner in group.get_all_groups()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of lm-eval, and rename `acc,none` (no filter) to `acc`, `acc_stderr,none` to `acc_stderr`."""
    return {
        name.removesuffix(",none"): value
        for name, value in scores.items()
        if isinstance(value, int | float) and name not in {"sample_len", "samples"}
    }
