"""A collected task needs nothing but its folder, and code that comes with a task runs only if it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from components.lib.errors import Refusal
from components.lib.store.artifacts import Manifest
from components.lib.tasks.files import collect


def write(file: Path, **fields: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(fields, sort_keys=False))
    return file


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A task file with its data beside it."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rows.jsonl").write_text("{}")
    kwargs = {"data_files": {"test": "rows.jsonl"}}
    return write(tmp_path / "own" / "own.yaml", task="own", dataset_path="json", dataset_kwargs=kwargs)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def written(out: Path, task: str) -> dict[str, Any]:
    return yaml.safe_load((out / f"{task}.yaml").read_text())


class TestData:
    def test_beside_the_task_file_travels_with_it(self, own: Path, out: Path) -> None:
        collect(own, out)
        place = written(out, "own")["dataset_kwargs"]["data_files"]["test"]
        assert (out / place).read_text() == "{}"
        assert Path(place).parts[0] == "data"

    def test_is_looked_for_in_the_working_directory_too(
        self, own: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved = own.rename(own.parents[1] / "own.yaml")
        monkeypatch.chdir(own.parent)
        collect(moved, out)
        assert (out / written(out, "own")["dataset_kwargs"]["data_files"]["test"]).is_file()

    @pytest.mark.parametrize("pattern", ["part*.jsonl", ["part1.jsonl", "part2.jsonl"], "{here}/part*.jsonl"])
    def test_may_be_several_files(self, own: Path, out: Path, pattern: Any) -> None:
        for name in ("part1", "part2"):
            (own.parent / f"{name}.jsonl").write_text(name)
        given = pattern.format(here=own.parent) if isinstance(pattern, str) else pattern
        collect(write(own, task="own", dataset_kwargs={"data_files": given}), out)
        places = written(out, "own")["dataset_kwargs"]["data_files"]
        assert [(out / place).read_text() for place in places] == ["part1", "part2"]

    @pytest.mark.parametrize("fields", [{"dataset_path": "./rows"}, {"dataset_kwargs": {"data_dir": "rows"}}])
    def test_may_be_a_folder(self, own: Path, out: Path, fields: dict[str, Any]) -> None:
        (own.parent / "rows" / "deep").mkdir(parents=True)
        (own.parent / "rows" / "deep" / "a.jsonl").write_text("a")
        collect(write(own, task="own", **fields), out)
        config = written(out, "own")
        place = config.get("dataset_kwargs", {}).get("data_dir") or config["dataset_path"]
        assert (out / place / "deep" / "a.jsonl").read_text() == "a"

    def test_at_a_url_stays_there(self, own: Path, out: Path) -> None:
        collect(write(own, task="own", dataset_kwargs={"data_files": "https://example.org/a.json"}), out)
        assert written(out, "own")["dataset_kwargs"]["data_files"] == "https://example.org/a.json"

    @pytest.mark.parametrize("name", ["data_files", "data_dir"])
    def test_that_is_missing_is_refused(self, own: Path, out: Path, name: str) -> None:
        write(own, task="own", dataset_kwargs={name: "lost"})
        with pytest.raises(Refusal, match=rf"own.yaml names lost in dataset_kwargs.{name}, which is neither beside it"):
            collect(own, out)


class TestAnInclude:
    def test_is_merged_below_the_files_own_fields(self, own: Path, out: Path) -> None:
        write(own.parent / "shared" / "base.yaml", task="base", doc_to_text="base", output_type="multiple_choice")
        collect(write(own, include="shared/base.yaml", task="own", doc_to_text="own"), out)
        assert written(out, "own") == {"task": "own", "doc_to_text": "own", "output_type": "multiple_choice"}

    def test_of_itself_is_refused(self, own: Path, out: Path) -> None:
        with pytest.raises(Refusal, match="includes itself"):
            collect(write(own, include="own.yaml", task="own"), out)


class TestCode:
    @pytest.fixture
    def coded(self, own: Path) -> Path:
        (own.parent / "utils.py").write_text("def docs(data):\n    return data\n")
        own.write_text("task: own\nprocess_docs: !function utils.docs\n")
        return own

    def test_is_refused_without_the_flag(self, coded: Path, out: Path) -> None:
        with pytest.raises(
            Refusal, match=r"runs the Python code utils.docs: set evaluate.remote_code to true if you trust"
        ):
            collect(coded, out)

    def test_of_an_included_file_is_refused_too(self, coded: Path, out: Path) -> None:
        with pytest.raises(Refusal, match=r"runs the Python code utils\.docs"):
            collect(write(coded.parent / "other.yaml", task="other", include="own.yaml"), out)

    def test_travels_with_the_flag(self, coded: Path, out: Path) -> None:
        collect(coded, out, remote_code=True)
        line = (out / "own.yaml").read_text().splitlines()[0]
        module, _, function = line.removeprefix("process_docs: !function ").strip("'").rpartition(".")
        assert function == "docs"
        assert (out / f"{module.replace('.', '/')}.py").read_text() == (coded.parent / "utils.py").read_text()

    def test_of_a_metric_that_is_fetched_is_refused_without_the_flag(self, own: Path, out: Path) -> None:
        write(own, task="own", metric_list=[{"metric": "bleurt", "hf_evaluate": True}])
        with pytest.raises(Refusal, match="fetches the code of the metric 'bleurt'"):
            collect(own, out)
        collect(own, out, remote_code=True)

    def test_by_another_tag_of_yaml_is_refused(self, own: Path, out: Path) -> None:
        own.write_text("task: !!python/object/apply:os.getcwd []\n")
        with pytest.raises(Refusal, match=r"own.yaml cannot be read"):
            collect(own, out, remote_code=True)


class TestAFolder:
    def test_gives_all_its_tasks_and_no_templates(self, own: Path, out: Path) -> None:
        write(own.parent / "deep" / "other.yml", task="other")
        write(own.parent / "_template.yaml", output_type="multiple_choice")
        write(own.parent / "group.yaml", group="both", task=["own", "other"])
        collect(own.parent, out)
        assert sorted(path.name for path in out.glob("*.yaml")) == ["other.yaml", "own.yaml"]

    def test_without_a_task_is_refused(self, tmp_path: Path, out: Path) -> None:
        write(tmp_path / "group.yaml", group="a", task=["b"])
        with pytest.raises(Refusal, match="has no task file"):
            collect(tmp_path, out)
        with pytest.raises(Refusal, match="has no 'task', which names it"):
            collect(tmp_path / "group.yaml", out)

    def test_with_two_tasks_of_one_name_is_refused(self, own: Path, out: Path) -> None:
        write(own.parent / "again.yaml", task="own")
        with pytest.raises(Refusal, match=r"again.yaml and .*own.yaml both define 'own'"):
            collect(own.parent, out)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(
        Refusal, match="neither a file nor a folder here: check the path; a task of lm-eval is written by"
    ):
        collect(tmp_path / "lost.yaml", out)


def test_the_same_content_is_the_same_artifact_wherever_it_lies(own: Path, out: Path, tmp_path: Path) -> None:
    first = Manifest.of(collect(own, out)).digest
    moved = own.parent.rename(tmp_path / "moved")
    (tmp_path / "again").mkdir()
    assert Manifest.of(collect(moved / "own.yaml", tmp_path / "again")).digest == first
    (moved / "rows.jsonl").write_text("{} ")
    (tmp_path / "changed").mkdir()
    assert Manifest.of(collect(moved / "own.yaml", tmp_path / "changed")).digest != first
