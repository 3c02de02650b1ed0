"""Why a stage would run, in sentences that name the part of its key."""

from __future__ import annotations

from typing import Any

from pipeline.runners.why import differences

MADE_OF: dict[str, Any] = {
    "stage": "regularize",
    "variant": "",
    "inputs": {"release": "a", "windows": "b"},
    "settings": {"regularize": {"steps": 100, "objective": {"lm": 0.5}}},
    "modules": {"components.lib.training.loop": "1", "components.lib.training.penalty": "2"},
    "libraries": {"torch": "2.13.0"},
    "salt": 0,
}


def differs(**now: Any) -> list[str]:
    return list(differences(MADE_OF, MADE_OF | now))


def test_nothing_differs_from_itself() -> None:
    assert differs() == []


def test_an_input() -> None:
    assert differs(inputs={"release": "c", "windows": "b"}) == ["input release: other content"]
    assert differs(inputs={"release": "a"}) == ["input windows: absent now"]
    assert differs(inputs={"release": "a", "windows": "b", "text": "c"}) == ["input text: added"]


def test_a_setting_from_what_to_what() -> None:
    settings = {"regularize": {"steps": 40, "objective": {"lm": 1.0}}}
    assert differs(settings=settings) == [
        "setting regularize.objective.lm: 0.5 → 1.0",
        "setting regularize.steps: 100 → 40",
    ]
    assert differs(settings={"regularize": {"steps": 100}}) == ["setting regularize.objective.lm: 0.5 → none"]


def test_code_by_its_module() -> None:
    modules = {"components.lib.training.loop": "9", "components.lib.training.schedule": "3"}
    assert differs(modules=modules) == [
        "code components.lib.training.loop: changed",
        "code components.lib.training.penalty: no longer used",
        "code components.lib.training.schedule: added",
    ]


def test_a_library_and_the_salt() -> None:
    assert differs(libraries={"torch": "2.14.0"}, salt=1) == ["library torch: 2.13.0 → 2.14.0", "salt: 0 → 1"]
