"""What a registered version's tags tell."""

from __future__ import annotations

from pathlib import Path

from components.register.report import Report
from components.register.run import removed
from tests.components.register.conftest import build_both, build_channels


def test_layers_are_named_and_channels_counted(report: Report, tmp_path: Path) -> None:
    assert removed(report) == "layers 4, 7, 9"
    assert removed(build_channels(tmp_path)) == "hidden 64 of 256; ffn 172 of 684"
    assert removed(build_both(tmp_path)) == "layers 4, 7, 9; ffn 172 of 684"
