"""A text becomes a task: the true continuation among three from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.evaluate.continuations import CONTEXT, CONTINUATION, questions, write_task
from components.lib.errors import Refusal
from components.lib.tasks.load import load_tasks

WORDS = [f"w{number}" for number in range(3_000)]
TEXT = [" ".join(WORDS[:1_000]), "\n ".join(WORDS[1_000:])]


def test_the_true_continuation_follows_its_context_and_the_others_do_not() -> None:
    made = questions(TEXT, 50)
    assert len(made) == 50
    for one in made:
        shown, true = one["context"].split(), one["choices"][one["label"]].split()
        start = WORDS.index(shown[0])
        assert [*shown, *true] == WORDS[start : start + CONTEXT + CONTINUATION]
        others = [choice for place, choice in enumerate(one["choices"]) if place != one["label"]]
        assert len(set(others)) == 3
        assert not {word for other in others for word in other.split()} & {*shown, *true}


def test_the_questions_are_from_the_whole_text_and_the_labels_from_all_places() -> None:
    made = questions(TEXT, 50)
    assert made[0]["context"].startswith("w0 ")
    assert made[-1]["choices"][made[-1]["label"]].endswith(" w2999")
    assert {one["label"] for one in made} == {0, 1, 2, 3}
    assert made == questions(TEXT, 50) != questions(TEXT, 50, seed=1)


def test_a_short_text_gives_fewer_and_a_shorter_one_is_refused() -> None:
    assert len(questions(["w " * 30 * 30], 500)) == 30
    with pytest.raises(Refusal, match=r"the text has 300 words, which give 10 questions of 30 words, fewer than 20"):
        questions(["w " * 300], 500)


def test_lm_eval_takes_the_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    made = questions(TEXT, 20)
    (task,) = load_tasks(configs=[write_task("continue_home", made, tmp_path)])["tasks"].values()
    first = task.eval_docs[0]
    assert task.doc_to_text(first) == made[0]["context"]
    assert task.doc_to_choice(first) == made[0]["choices"]
    assert task.doc_to_target(first) == made[0]["label"]
