"""Task files are pinned with the data that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.schema import Evaluate
from components.lib.store.store import Store
from components.pin.tasks import check_loadable, check_task, find_task, pin_task

TASK = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_target": 0,
    "doc_to_choice": ["a", "b"],
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rows.jsonl").write_text('{"q": "?"}\n')
    (tmp_path / "own" / "own.yaml").write_text(json.dumps(TASK))
    return tmp_path / "own" / "own.yaml"


def evaluate(*tasks: str) -> Evaluate:
    return Evaluate.model_validate({"perplexity": {"test": "test.txt"}, "tasks": tasks})


def test_a_task_is_stored_with_its_data(own: Path, store: Store) -> None:
    reference = pin_task(str(own), False, store)
    names = [Path(file.name).name for file in store.manifest(reference).files]
    assert sorted(names) == ["own.yaml", "rows.jsonl"]
    assert pin_task(str(reference), False, store) == reference


def test_its_content_alone_counts(own: Path, store: Store) -> None:
    assert find_task(str(own), False, store) is None
    reference = pin_task(str(own), False, store)
    moved = own.parent.rename(own.parents[1] / "moved")
    assert find_task(f"{moved}/", False, store) == reference
    (moved / "rows.jsonl").write_text('{"q": "!"}\n')
    assert find_task(f"{moved}/", False, store) is None


def test_a_task_on_s3_is_stored_as_a_local_one(own: Path, store: Store) -> None:
    for file in own.parent.iterdir():
        store.write_text(f"benchmarks/{file.name}", file.read_text())
    assert pin_task(store.uri("benchmarks"), False, store) == pin_task(str(own), False, store)


def test_code_is_refused_before_the_run(own: Path) -> None:
    own.write_text("task: own\nprocess_docs: !function utils.docs\n")
    with pytest.raises(Refusal, match=r"evaluate.remote_code"):
        check_task(str(own), False)


def test_every_task_of_a_pinned_recipe_is_loaded_once(own: Path, store: Store) -> None:
    pytest.importorskip("lm_eval")
    check_loadable(evaluate(str(pin_task(str(own), False, store))), store)
    own.write_text(json.dumps(TASK | {"test_split": "lost"}))
    with pytest.raises(Refusal, match="the task own cannot be loaded"):
        check_loadable(evaluate(str(pin_task(str(own), False, store))), store)
