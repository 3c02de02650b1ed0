"""The verdict: does the candidate pass every rule of the recipe's `promote` section?

A rule compares a number of the candidate with the number of another model from the same evaluation. A missing or NaN number
on either side fails the rule, and the note of the rule names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.lib.recipe.schema import Recipe
from components.register.measured import Measured, ratio

Bound = Literal["at most", "at least"]


class Rule(BaseModel):
    """One rule, applied to one text or one batch size if it applies to each of them."""

    model_config = ConfigDict(frozen=True)

    name: str
    """The field of `promote`, with the text or batch size: `perplexity_over_dense[wikitext2]`, `prefill_speedup[8]`."""
    value: float | None
    """The candidate's number over the other model's; None if one of them is missing."""
    compared: dict[str, float | None] = {}
    """The two numbers, by model."""
    threshold: float
    bound: Bound
    passed: bool
    note: str = ""
    """The reason if the rule has no value; else empty."""


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

    The recipe names the texts and batch sizes, so that a rule on one that the evaluation left out fails. Without rules,
    every candidate passes.

    Args:
        models: `dense` and `candidate`; `champion` and `pruned-first` if they were measured.
        recipe: `promote` has the rules, `evaluate` the texts and batch sizes that they apply to.
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
