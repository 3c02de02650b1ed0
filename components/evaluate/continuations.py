"""A task made from any text: which of four continuations is the true one? For domains without a benchmark.

The text is cut at even distances into places of CONTEXT + CONTINUATION words. A question shows the context; its choices are the true
continuation and the continuations of three other places. The questions are the same for every tokenizer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.lib.errors import Refusal

CONTEXT, CONTINUATION = 24, 6
"""Words."""
CHOICES = 4
FEWEST = 20
"""With fewer questions the accuracy says nothing."""


def questions(documents: Sequence[str], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return at most `count` questions, each with `context`, `choices` and the `label` of the true one.

    Raises:
        Refusal: the text gives fewer than FEWEST.
    """
    words = [word for document in documents for word in document.split()]
    length = CONTEXT + CONTINUATION
    count = min(count, len(words) // length)
    if count < FEWEST:
        raise Refusal(
            f"the text has {len(words)} words, which give {count} questions of {length} words, fewer than {FEWEST}: name a "
            "longer text, or leave evaluate.continuations out"
        )
    starts = [place * (len(words) - length) // (count - 1) for place in range(count)]
    contexts = [" ".join(words[start : start + CONTEXT]) for start in starts]
    endings = [" ".join(words[start + CONTEXT : start + length]) for start in starts]
    draw = random.Random(seed)
    made = []
    for place in range(count):
        others = draw.sample([other for other in range(count) if other != place], CHOICES - 1)
        label = draw.randrange(CHOICES)
        choices = [endings[other] for other in others]
        choices.insert(label, endings[place])
        made.append({"context": contexts[place], "choices": choices, "label": label})
    return made


def write_task(name: str, made: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Write the questions into the folder, and return the task of lm-eval that asks them."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in made))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
