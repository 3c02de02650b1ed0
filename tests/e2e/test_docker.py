"""The whole way in containers, and then in processes, which find everything made.

    make images
    ESPALIER_TEST_DOCKER=1 python -m pytest tests/e2e/test_docker.py

The image has to be made from these sources; ESPALIER_IMAGE names another than espalier:cpu.
"""

from __future__ import annotations

import os

import pytest

from components.lib.stage.code import code_of_everything
from pipeline.runners.docker import IMAGE
from tests.e2e.conftest import Bench, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

WORKING = {
    "calibrate",
    "learn_gates",
    "regularize",
    "prune",
    "control pruned-first",
    "control dense-trained",
    "evaluate",
}


@pytest.fixture(scope="module", autouse=True)
def image() -> str:
    """The image of these sources; a skip where there is none."""
    if os.environ.get("ESPALIER_TEST_DOCKER") != "1":
        pytest.skip("set ESPALIER_TEST_DOCKER=1 to run the stages in containers")
    import docker

    name = os.environ.get("ESPALIER_IMAGE", IMAGE)
    try:
        found = docker.from_env().images.get(name)
    except docker.errors.ImageNotFound:
        pytest.skip(f"the image {name} is not here: make images")
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    if found.labels.get("espalier.code") != code_of_everything():
        pytest.skip(f"the image {name} was made from other sources: make images")
    return name


@pytest.fixture(scope="module")
def contained(bench: Bench, image: str) -> Outcome:
    """A run in containers."""
    outcome = bench.espalier(*bench.run_arguments("boxed"), "--on", "docker", "--image", image)
    assert outcome.status == 0, outcome.told
    return outcome


def test_every_stage_works_in_its_container(contained: Outcome) -> None:
    assert set(contained.stages("started")) >= WORKING
    assert contained.report["verdict"]["passed"]


def test_processes_find_what_containers_made(bench: Bench, contained: Outcome) -> None:
    again = bench.run("boxed")

    assert again.status == 0, again.told
    assert set(again.stages("reused")) >= WORKING
    assert again.report["registered"]["version"] == contained.report["registered"]["version"]
    for part in ("selection", "dense", "candidate", "controls"):
        assert again.report[part] == contained.report[part]


def test_a_stages_refusal_comes_out_of_its_container(bench: Bench, image: str) -> None:
    refused = bench.espalier(
        *bench.run_arguments("boxed", ["calibration.samples=100000"]), "--on", "docker", "--image", image
    )

    assert refused.status == 1
    assert refused.told.startswith("espalier: ")
    assert "Traceback" not in refused.told


def test_what_a_container_runs_as_can_write_no_code(image: str) -> None:
    import docker

    script = "id -u; test -w /opt/espalier && echo writable; command -v gcc cc make; ls /root/.cache 2>/dev/null; true"
    said = docker.from_env().containers.run(image, ["sh", "-c", script], remove=True).decode().split()
    assert said == ["10001"]
