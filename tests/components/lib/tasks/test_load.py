"""Tasks are loaded through lm-eval with their data, before anything is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.lib.errors import Refusal
from components.lib.tasks import load as module
from components.lib.tasks.files import collect
from components.lib.tasks.load import load_tasks


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(
        Refusal, match=r"need lm-eval, which is not installed: install espalier\[tasks\], or leave them out"
    ):
        load_tasks(["piqa"])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def task(folder: Path, name: str = "parrot", **fields: Any) -> Path:
    """Write a task file with four questions, and collect it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"w{q} w9", "choices": ["w20", "w30"], "answer": q % 2} for q in range(10, 14)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.json"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | fields))
    out = folder / "collected"
    out.mkdir()
    return collect(folder / f"{name}.yaml", out, remote_code=True)


def test_the_tasks_of_a_folder_are_loaded_with_their_data_and_nothing_stays_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    loaded = load_tasks(folders=[task(tmp_path / "a"), task(tmp_path / "b", "other")])
    assert list(loaded["tasks"]) == ["parrot", "other"]
    assert [len(one.eval_docs) for one in loaded["tasks"].values()] == [4, 4]
    assert not (tmp_path / "home").exists()


def test_an_unknown_task_is_refused_with_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    # A few tasks in place of lm-eval's ten thousand, which take long to find.
    some = TaskManager(include_defaults=False, include_path=task(tmp_path))
    monkeypatch.setattr(module, "_manager", lambda shipped: some)
    with pytest.raises(Refusal, match=r"names 'parrots', which lm-eval does not know: did you mean 'parrot'"):
        load_tasks(["parrots"])


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="has 'parrot' twice: name each task once"):
        load_tasks(folders=[task(tmp_path / "a"), task(tmp_path / "b")])


def test_data_that_cannot_be_fetched_is_refused(tmp_path: Path) -> None:
    folder = task(tmp_path)
    next((folder / "data").rglob("rows.json")).unlink()
    with pytest.raises(Refusal, match=r"names 'parrot', whose data cannot be fetched"):
        load_tasks(folders=[folder])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"test_split": "lost"}, "the task parrot cannot be loaded"),
        ({"unsafe_code": True}, "names 'parrot', which runs code that the model writes"),
        ({"metric_list": [{"metric": "bleurt"}]}, "the metric 'bleurt', which lm-eval does not have"),
        ({"doc_to_text": "{{ question.__class__.__mro__ }}"}, "the task parrot cannot be loaded .SecurityError"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        load_tasks(folders=[task(tmp_path, **fields)])


def test_code_of_a_task_runs_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("def two(data):\n    return data.select(range(2))\n")
    task(tmp_path)
    file = tmp_path / "parrot.yaml"
    file.write_text(file.read_text() + "process_docs: !function utils.two\n")
    out = tmp_path / "again"
    out.mkdir()
    loaded = load_tasks(folders=[collect(file, out, remote_code=True)], remote_code=True)
    assert len(loaded["tasks"]["parrot"].eval_docs) == 2
