"""The verdict: does the candidate pass every rule of the recipe's `promote` section?

A rule compares a figure of the candidate with the figure of another model from the same evaluation. A figure that is missing or
NaN on either side, or was not measured as the recipe asks, fails the rule, and the note of the rule says so. This is the only
place that judges: the report, the version's tags and the branch of the pipeline read the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.lib.provenance.signature import SIGNED_BY, UNSIGNED
from components.lib.recipe.promotion import Rule
from components.lib.recipe.schema import Recipe
from components.lib.recipe.target import Target
from components.register.accuracy import Accuracy, judged_tasks, mean_accuracy
from components.register.format import times
from components.register.measured import Context, Measured, figure, ratio, unlike


class Outcome(BaseModel):
    """The outcome of one rule, on one text, task or batch size if it applies to each of them."""

    model_config = ConfigDict(frozen=True)

    name: str
    """The rule's name, with the text, task or batch size: `quality[wikitext2]`, `prefill[8]`."""
    figure: str
    """The figure that is compared."""
    value: float | None
    """The candidate's figure over the other model's; None if it cannot be compared."""
    error: float | None = None
    """The standard error of the value, which counts against the candidate; None for a figure without one."""
    compared: dict[str, float | None] = {}
    """The two figures, by model."""
    bound: float
    sense: Literal["at most", "at least"]
    passed: bool
    why: str
    """The reason for the rule."""
    note: str = ""
    """The reason if the rule has no value; else empty."""

    @property
    def told(self) -> str:
        """Return what was found and what was asked: "0.968× ± 0.012, asked at least 0.95×"; or the note."""
        error = "" if self.error is None else f" ± {self.error:.3f}"
        return self.note or f"{times(self.value)}{error}, asked {self.sense} {self.bound:g}×"


class Verdict(BaseModel):
    """Every rule with its outcome."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    rules: tuple[Outcome, ...]
    signature: str = UNSIGNED
    """Who signed the candidate."""

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The rules that do not hold."""
        return tuple(rule for rule in self.rules if not rule.passed)

    @property
    def target_holds(self) -> bool:
        """Return True if every rule of the recipe's target holds, or it has none."""
        return all(rule.passed for rule in self.rules if rule.name.startswith("target."))

    @property
    def word(self) -> str:
        """`pass` or `fail`."""
        return "pass" if self.passed else "fail"


def judge(models: Mapping[str, Measured], recipe: Recipe, context: Context, signature: str = UNSIGNED) -> Verdict:
    """Apply the recipe's rules to the models of one evaluation.

    The recipe names the texts and batch sizes, so that a rule on one that the evaluation left out fails. Without rules,
    every candidate passes.

    Args:
        models: `dense` and `candidate`; `champion` and the controls if they were measured.
        recipe: `promote` has the rules, `evaluate` says how the figures are measured.
        context: how they were measured.
        signature: who signed the candidate, as `check_signature` says it.
    """
    asked = Context.asked(recipe)
    outcomes: list[Outcome] = []
    # The name of a rule has no dot, so that none is called as the target is.
    target = {f"target.{recipe.target.field}": rule for rule in _of_target(recipe.target)} if recipe.target else {}
    for name, rule in {**target, **recipe.promote.rules}.items():
        for part in rule.on or _parts(rule, models, recipe):
            called = f"{name}[{part}]" if part else name
            outcomes.append(_outcome(called, rule, part, models, unlike(rule.figure, part, context, asked)))
    if recipe.target and recipe.target.figure == "bytes":
        outcomes.insert(0, _bytes(recipe.target, models["candidate"]))
    if recipe.promote.require_signature:
        outcomes.append(_signed(signature))
    return Verdict(passed=all(one.passed for one in outcomes), rules=tuple(outcomes), signature=signature)


def _signed(signature: str) -> Outcome:
    """Judge the signature that the recipe requires, as 1 of 1 or 0 of 1."""
    holds = signature.startswith(SIGNED_BY)
    return Outcome(
        name="require_signature",
        figure="signature",
        value=float(holds),
        bound=1,
        sense="at least",
        passed=holds,
        why="a model without a signature that holds may not serve",
        note=signature,
    )


WHY = "The recipe's target, confirmed after the whole recipe."


def _of_target(target: Target) -> list[Rule]:
    """Return the rule that confirms a target on what is evaluated; none for bytes, which are no ratio to another model."""
    figures: dict[str, Literal["perplexity", "mean_accuracy", "prefill"]] = {
        "perplexity": "perplexity",
        "accuracy": "mean_accuracy",
        "prefill": "prefill",
    }
    figure = figures.get(target.figure)
    return [Rule(figure=figure, bound=target.bound, why=WHY)] if figure else []


def _bytes(target: Target, candidate: Measured) -> Outcome:
    value = candidate.bytes / target.bound
    return Outcome(
        name=f"target.{target.field}",
        figure="bytes",
        value=value,
        compared={"candidate": candidate.bytes, "target": target.bound},
        bound=1.0,
        sense="at most",
        passed=value <= 1,
        why=WHY,
    )


def _parts(rule: Rule, models: Mapping[str, Measured], recipe: Recipe) -> Sequence[str]:
    """Return the texts, batch sizes or tasks that a rule applies to; one empty name for a figure of the whole model."""
    if rule.figure == "perplexity":
        return list(recipe.evaluate.perplexity)
    if rule.figure in ("prefill", "decode"):
        return [str(batch) for batch in recipe.evaluate.speed.batches]
    if rule.figure == "accuracy":
        # With no task at all, the empty name makes the rule fail instead of applying to nothing.
        return judged_tasks(models["dense"].tasks) or [""]
    return [""]


def _outcome(name: str, rule: Rule, part: str, models: Mapping[str, Measured], otherwise: str) -> Outcome:
    """Judge one rule on one part.

    Args:
        name: the outcome's name.
        rule: the rule.
        part: the text, task or batch size; empty for a figure of the whole model.
        models: the models by name.
        otherwise: why the figure was not measured as the recipe asks; empty if it was.
    """
    made = Outcome(
        name=name,
        figure=rule.figure,
        value=None,
        bound=rule.bound,
        sense="at least" if rule.at_least else "at most",
        passed=False,
        why=rule.why,
    )
    if rule.against == "champion" and "champion" not in models:
        return made.model_copy(update={"passed": True, "note": "there is no champion yet"})
    found = {side: _figure(rule.figure, part, models, side) for side in ("candidate", rule.against)}
    compared = {side: figure.value if figure else None for side, figure in found.items()}
    missing = [side for side, value in compared.items() if ratio(value, 1.0) is None]
    made = made.model_copy(update={"compared": compared})
    if missing:
        what = f"{rule.figure.replace('_', ' ')}{f' on {part}' if part else ''}"
        return made.model_copy(update={"note": f"not measured: {what} of {' and of '.join(missing)}"})
    if otherwise:
        return made.model_copy(update={"note": otherwise})
    return made.model_copy(update=_judged(rule, *(figure for figure in found.values() if figure)))


def _judged(rule: Rule, candidate: Accuracy, other: Accuracy) -> dict[str, float | bool | str | None]:
    """Compare the ratio with the bound.

    The error of r = c / o is r·√((e_c/c)² + (e_o/o)²), an upper bound if both models answered the same questions. It counts
    against the candidate: too few questions must not pass a model.
    """
    value = candidate.value / other.value
    if rule.figure not in ("accuracy", "mean_accuracy"):
        return {"value": value, "passed": value >= rule.bound if rule.at_least else value <= rule.bound}
    if candidate.error is None or other.error is None:
        return {"note": "its standard error is not known"}
    error = value * math.hypot(candidate.error / candidate.value, other.error / other.value)
    return {"value": value, "error": error, "passed": value - error >= rule.bound}


def _figure(name: str, part: str, models: Mapping[str, Measured], side: str) -> Accuracy | None:
    """Return a model's figure, with its standard error if it has one; None if it was not measured."""
    model = models.get(side)
    if model is None:
        return None
    if name == "mean_accuracy":
        return mean_accuracy(model.tasks, judged_tasks(models["dense"].tasks))
    return figure(model, name, part)
