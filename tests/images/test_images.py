"""What the images are made of: a lock that fits the project, and sources that are all there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

from components.lib.stage.code import code_of_everything

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (IMAGES / f"{name}.txt").read_text().splitlines()]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)={2,3}(\S+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "every line of a lock is name==version"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


@pytest.mark.parametrize("torch", ["torch-cpu", "torch-cuda"])
def test_the_lock_holds_every_dependency_in_the_range_that_the_project_asks_for(torch: str) -> None:
    pins = locked("packages", torch)
    for text in [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["gguf"],
        *PROJECT["optional-dependencies"]["tasks"],
    ]:
        asked = Requirement(text)
        name = canonicalize_name(asked.name)
        assert name in pins, f"{name} is missing from images/packages.txt"
        assert asked.specifier.contains(pins[name], prereleases=True), f"images lock {name} {pins[name]}, not {asked}"


def test_both_images_hold_the_same_pytorch() -> None:
    cpu, cuda = locked("torch-cpu")["torch"], locked("torch-cuda")["torch"]
    assert cpu.partition("+")[0] == cuda
    assert cpu.endswith("+cpu")


def test_the_images_hold_what_the_tests_ran_with() -> None:
    """The lock is that of constraints.txt, as far as that names the same packages."""
    constraints = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if line.count("==") == 1
    )
    theirs = {canonicalize_name(name): version for name, version in constraints.items()}
    ours = locked("packages")
    assert {name: ours[name] for name in ours if name in theirs} == {
        name: theirs[name] for name in ours if name in theirs
    }


def test_every_source_is_in_a_package_so_that_the_image_holds_the_code_that_keys_are_made_of() -> None:
    packages = {name.replace(".", "/") for name in find_packages(str(ROOT), include=["components*", "pipeline*"])}
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for path in (ROOT / "components").rglob("*")
        if path.suffix in {".py", ".j2"}
    }
    assert folders <= packages


def test_the_check_imports_every_stage_and_knows_the_code() -> None:
    done = subprocess.run(
        [sys.executable, str(IMAGES / "check.py")], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == code_of_everything()


def test_the_check_fails_where_the_code_is_not_what_the_label_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = runpy.run_path(str(IMAGES / "check.py"))["main"]
    monkeypatch.setitem(check.__globals__, "modules", list)

    monkeypatch.setenv("ESPALIER_CODE", code_of_everything())
    assert check() == 0
    monkeypatch.setenv("ESPALIER_CODE", "0" * 64)
    assert check() == 1
    assert "not 0000" in capsys.readouterr().out


def test_no_index_no_secret_and_no_root_end_up_in_an_image() -> None:
    text = (IMAGES / "Containerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.M)
    for target in ("cpu", "cuda"):
        (stage,) = [one for one in stages if re.match(rf"\S+ AS {target}\b", one)]
        assert re.findall(r"^USER (\S+)", stage, flags=re.M)[-1] == "10001:0"
    assert not re.search(r"^ENV .*PIP_", text, flags=re.M)
    assert not re.search(r"^(COPY|ADD) .*(pip\.conf|\.crt|\.pem)", text, flags=re.M)
    for instruction in re.findall(r"^RUN (?:.*\\\n)*.*", text, flags=re.M):
        if "pip install --no-deps -r" in instruction or "pip wheel" in instruction:
            assert "--mount=type=secret,id=pip_conf" in instruction
