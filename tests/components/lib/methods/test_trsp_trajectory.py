"""What TRSP leaves beside its choice feeds the keys of later stages: the same steps give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from components.lib.methods.trsp.trajectory import Step, draw, save

STEPS = [
    Step(round=0, step=1, gates=[0.9, 0.8, 0.7]),
    Step(round=0, step=2, gates=[0.8, 0.6, 0.4]),
    Step(round=1, step=3, gates=[0.7, 0.5, 0.0]),
]
ELSEWHERE = """
import sys
from pathlib import Path
from tests.components.lib.methods.test_trsp_trajectory import STEPS, draw
draw(STEPS, Path(sys.argv[1]))
"""


def test_two_drawings_have_the_same_bytes_whatever_the_process_its_date_and_its_matplotlibrc(tmp_path: Path) -> None:
    here, there = tmp_path / "here.svg", tmp_path / "there.svg"
    (tmp_path / "matplotlibrc").write_text("svg.hashsalt: other\nlines.color: red\naxes.facecolor: black\n")
    draw(STEPS, here)
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, there], env=environment, check=True)
    assert hashlib.sha256(here.read_bytes()).hexdigest() == hashlib.sha256(there.read_bytes()).hexdigest()
    assert "<dc:date>" not in here.read_text()


def test_other_steps_give_another_picture(tmp_path: Path) -> None:
    draw(STEPS, tmp_path / "all.svg")
    draw(STEPS[:2], tmp_path / "two.svg")
    assert (tmp_path / "all.svg").read_bytes() != (tmp_path / "two.svg").read_bytes()


def test_the_picture_is_an_svg_with_a_name_for_every_layer(tmp_path: Path) -> None:
    draw(STEPS, tmp_path / "gates.svg")
    ElementTree.parse(tmp_path / "gates.svg")
    assert all(f"<!-- {layer} -->" in (tmp_path / "gates.svg").read_text() for layer in range(3))


def test_the_steps_are_one_json_object_a_line(tmp_path: Path) -> None:
    save(STEPS, tmp_path / "trajectory.jsonl")
    assert [json.loads(line) for line in (tmp_path / "trajectory.jsonl").read_text().splitlines()] == STEPS
