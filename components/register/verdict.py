"""The verdict: does the candidate hold every rule of the recipe's `promote` section?

A rule compares one number of the candidate with another model's from the same evaluation. What was not measured cannot
hold: a missing or NaN number on either side fails its rule, and the rule says which one it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.lib.recipe.schema import Recipe
from components.register.measured import Measured, ratio

Bound = Literal["at most", "at least"]


class Rule(BaseModel):
    """One rule, for one text or one batch size where the rule speaks of each."""

    model_config = ConfigDict(frozen=True)

    name: str
    """The field of `promote`, and what it was applied to: `perplexity_over_dense[wikitext2]`, `prefill_speedup[8]`."""
    value: float | None
    """The candidate's number over the other model's; None where it could not be formed."""
    compared: dict[str, float | None] = {}
    """The two numbers, by model."""
    threshold: float
    bound: Bound
    passed: bool
    note: str = ""
    """Why the rule failed or holds without a value; empty where the number says it."""


class Verdict(BaseModel):
    """Every rule with its outcome."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    rules: tuple[Rule, ...]

    @property
    def failed(self) -> tuple[Rule, ...]:
        """The rules that do not hold."""
        return tuple(rule for rule in self.rules if not rule.passed)


def judge(models: Mapping[str, Measured], recipe: Recipe) -> Verdict:
    """Apply the recipe's rules to the models of one evaluation.

    The texts and batch sizes are those the recipe asked for, so that one the evaluation left out fails rather than
    passes unseen. A recipe without rules asks for nothing, which every candidate holds.

    Args:
        models: `dense` and `candidate`; `champion` and `pruned-first` where they were measured.
        recipe: its `promote` gives the rules, its `evaluate` the texts and batch sizes they are applied to.
    """
    rules = (*_perplexity_rules(models, recipe), *_size_rules(models, recipe), *_speed_rules(models, recipe))
    return Verdict(passed=all(rule.passed for rule in rules), rules=rules)


def _perplexity_rules(models: Mapping[str, Measured], recipe: Recipe) -> Iterator[Rule]:
    promote = recipe.promote
    opponents = {
        "perplexity_over_dense": ("dense", promote.perplexity_over_dense),
        "perplexity_over_control": ("pruned-first", promote.perplexity_over_control),
        "perplexity_over_champion": ("champion", promote.perplexity_over_champion),
    }
    for name, (opponent, threshold) in opponents.items():
        if threshold is None:
            continue
        for text in recipe.evaluate.perplexity:
            rule = f"{name}[{text}]"
            if opponent == "champion" and "champion" not in models:
                yield _holds_without(rule, threshold, "there is no champion yet")
                continue
            found = {side: _perplexity(models, side, text) for side in ("candidate", opponent)}
            yield _rule(rule, found, threshold, "at most", f"perplexity on {text}")


def _size_rules(models: Mapping[str, Measured], recipe: Recipe) -> Iterator[Rule]:
    threshold = recipe.promote.parameters_over_dense
    if threshold is not None:
        found = {side: float(models[side].parameters) for side in ("candidate", "dense")}
        yield _rule("parameters_over_dense", found, threshold, "at most", "parameters")


def _speed_rules(models: Mapping[str, Measured], recipe: Recipe) -> Iterator[Rule]:
    thresholds = {"prefill": recipe.promote.prefill_speedup, "decode": recipe.promote.decode_speedup}
    for phase, threshold in thresholds.items():
        if threshold is None:
            continue
        for batch in map(str, recipe.evaluate.speed.batches):
            found = {side: models[side].tokens_per_second(phase, batch) for side in ("candidate", "dense")}
            yield _rule(f"{phase}_speedup[{batch}]", found, threshold, "at least", f"{phase} speed at batch {batch}")


def _perplexity(models: Mapping[str, Measured], model: str, text: str) -> float | None:
    return models[model].perplexity.get(text) if model in models else None


def _rule(name: str, found: Mapping[str, float | None], threshold: float, bound: Bound, what: str) -> Rule:
    """Judge the ratio of the two numbers of `found`, the candidate's first."""
    value = ratio(*found.values())
    missing = [model for model, number in found.items() if ratio(number, 1.0) is None]
    return Rule(
        name=name,
        value=value,
        compared=dict(found),
        threshold=threshold,
        bound=bound,
        passed=value is not None and (value <= threshold if bound == "at most" else value >= threshold),
        note=f"not measured: {what} of {' and of '.join(missing)}" if value is None else "",
    )


def _holds_without(name: str, threshold: float, why: str) -> Rule:
    return Rule(name=name, value=None, threshold=threshold, bound="at most", passed=True, note=why)
