"""Zero-shot tasks go through lm-eval unchanged."""

from __future__ import annotations

import json

import pytest
import torch

from components.evaluate.zero_shot import zero_shot
from components.lib.tasks.load import Loaded, load_tasks
from tests.components.lib.transformer import zoo

METRICS = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A task of four questions, each with two choices of one token."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("task")
    rows = [{"question": f"w{q} w9", "choices": ["w20", "w30"], "answer": q % 2} for q in range(10, 14)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "task": "parrot",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": METRICS,
    }
    return load_tasks(configs=[config])


def test_a_task_is_scored_as_the_models_logits_say(parrot: Loaded) -> None:
    model, tokenizer = zoo.SPECIMENS[0].model(layers=2), zoo.tokenizer()
    right = []
    for q in range(10, 14):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[q, 9]])).logits[0, -1]
        right.append(int(logits[30] > logits[20]) == q % 2)
    scores = zero_shot(parrot, model, tokenizer, batch_size=2)["parrot"]
    assert scores["acc"] == sum(right) / 4
    assert set(scores) == {"acc", "acc_stderr"}
    limited = zero_shot(parrot, model, tokenizer, batch_size=2, limit=2)["parrot"]
    assert limited["acc"] == sum(right[:2]) / 2


def test_a_second_model_is_asked_the_same_questions(parrot: Loaded) -> None:
    tokenizer = zoo.tokenizer()
    models = [zoo.SPECIMENS[0].model(layers=layers) for layers in (2, 3)]
    once = [zero_shot(parrot, model, tokenizer, batch_size=2) for model in models]
    again = [zero_shot(parrot, model, tokenizer, batch_size=2) for model in reversed(models)]
    assert once == again[::-1]
