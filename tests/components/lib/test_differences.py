"""Two nested mappings are compared by dotted names."""

from __future__ import annotations

from components.lib.differences import changed, flat


def test_nested_settings_have_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": ()}, "e": None}) == {"a.b.c": 1, "a.d": (), "e": None}


def test_each_difference_has_both_values_and_equal_ones_are_left_out() -> None:
    assert list(changed({"a": 1, "b": 2, "d": 4}, {"a": 1, "b": 3, "c": 5})) == [
        ("b", 2, 3),
        ("c", None, 5),
        ("d", 4, None),
    ]
