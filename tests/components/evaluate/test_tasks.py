"""Zero-shot tasks go through lm-eval unchanged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from components.evaluate import tasks as module
from components.evaluate.tasks import ZeroShot
from components.lib.errors import Refusal
from tests.components.lib.transformer import zoo

TASK = """
task: parrot
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(Refusal, match=r"install espalier\[tasks\]"):
        ZeroShot(["piqa"])


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of our own: four questions, each with two choices of one token."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("task")
    rows = [{"question": f"w{q} w9", "choices": ["w20", "w30"], "answer": q % 2} for q in range(10, 14)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "parrot.yaml").write_text(TASK.format(data=folder / "rows.json"))
    return folder / "parrot.yaml"


def test_a_task_is_scored_as_the_models_logits_say(own_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = zoo.SPECIMENS[0].model(layers=2), zoo.tokenizer()
    right = []
    for q in range(10, 14):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[q, 9]])).logits[0, -1]
        right.append(int(logits[30] > logits[20]) == q % 2)
    scores = ZeroShot([str(own_task)])(model, tokenizer, batch_size=2)["parrot"]
    assert scores["acc"] == sum(right) / 4
    assert "acc_stderr" in scores
    assert set(ZeroShot([str(own_task)], limit=2)(model, tokenizer, 2)["parrot"]) == set(scores)


def test_an_unknown_task_is_refused_with_its_neighbour(own_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    # A few tasks in place of lm-eval's ten thousand, which take long to find.
    some = TaskManager(include_defaults=False, include_path=own_task.parent)
    monkeypatch.setattr(module, "_manager", lambda shipped: some)
    with pytest.raises(Refusal, match=r"names 'parrots', which lm-eval does not know: did you mean 'parrot'"):
        ZeroShot(["parrots"])


def test_data_that_cannot_be_fetched_is_refused_before_anything_is_measured(own_task: Path, tmp_path: Path) -> None:
    task = tmp_path / "lost.yaml"
    task.write_text(own_task.read_text().replace("rows.json", "lost.json").replace("parrot", "lost"))
    with pytest.raises(Refusal, match=r"whose data cannot be fetched .*lost.json"):
        ZeroShot([str(task)])
