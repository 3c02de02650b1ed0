"""The typed recipe: one YAML, checked whole before anything starts.

A recipe says how a release is recompressed; which release, and under which name the result is registered, are arguments of
the run. Every field's description is its documentation: `docs/recipe.md` is written from these types.
"""

from __future__ import annotations

import difflib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from components.lib.errors import Refusal
from components.lib.recipe.section import Count, Fraction, Name, Rate, Section, Weight
from components.lib.transformer.layout import Axis


class Text(Section):
    """A text: a `.txt`, `.jsonl` or `.parquet` file, an `s3://` object, or a Hub data set. A plain string is a `path`."""

    path: str | None = Field(
        None, description="A .txt, .jsonl or .parquet file, or an s3:// object of one of these kinds."
    )
    hub: str | None = Field(None, description="A Hub data set, such as Salesforce/wikitext.")
    config: str | None = Field(None, description="The Hub data set's configuration.")
    split: str = Field("train", description="The Hub data set's split.")
    revision: str | None = Field(None, description="The Hub data set's revision; the newest when absent.")
    field: str = Field("text", description="The column that holds the text, in .jsonl, .parquet and Hub data sets.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": str(value)} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one_source(self) -> Text:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name exactly one of 'path' and 'hub'")
        return self


class Target(Section):
    """How much is removed."""

    ratio: Fraction = Field(
        description="The part of the layers to remove: 0.25 of 12 layers removes 3. Rounded to whole layers, at least one. For dress alone, the part of each axis."
    )


class Calibration(Section):
    """The text that chooses and trains."""

    data: Text = Field(description="The text the windows are drawn from.")
    samples: Count = Field(128, description="How many windows are drawn.")
    length: Annotated[int, Field(ge=8)] = Field(2048, description="Tokens in one window.")
    seed: int = Field(0, description="Seed of the draw.")


class Gates(Section):
    """TRSP's first regularisation: one learnable gate a layer, the weights frozen."""

    strategy: Literal["iterative", "one-shot"] = Field(
        "iterative",
        description="Remove one layer a round and learn the other gates on, or learn once and take the smallest.",
    )
    placement: Literal["branch", "output"] = Field(
        "branch",
        description="Gate what the layer adds, x + g·(f(x) − x), or its whole output, g·f(x), as the paper does.",
    )
    strength: Weight = Field(0.1, description="λ1, the weight of Σ|g|.")
    steps: Count = Field(12, description="Optimizer steps a round (one-shot: steps × the number of layers to remove).")
    batch_size: Count = Field(8, description="Windows a step.")
    learning_rate: Rate = Field(0.05, description="Adam's learning rate for the gates.")
    shortlist: Annotated[int, Field(ge=0)] = Field(
        4,
        description="How many of the smallest gates are measured by removing them, the cheapest going; 0 trusts the gates alone, as the paper does.",
    )
    seed: int = Field(0, description="Seed of the batches' order.")


class Dress(Section):
    """DReSS's choice of channels, made before the training."""

    axes: Annotated[tuple[Axis, ...], Field(min_length=1)] = Field(
        ("ffn",),
        description="What is narrowed: hidden (the residual stream, the paper's), ffn (intermediate channels), heads (key-value groups with their query heads).",
    )
    ratio: Fraction | dict[Axis, Fraction] | None = Field(
        None,
        description="The part of every axis to remove, or one for each ({ffn: 0.5, heads: 0.25}); target.ratio when absent.",
    )
    channels: Literal["random", "magnitude", "activation"] = Field(
        "activation",
        description="Which go: drawn from the seed, those of the smallest weights, or those of the smallest weights × activations on the calibration windows.",
    )
    multiple: Count | None = Field(
        None, description="hidden and ffn keep a multiple of this; 8 when absent, or more where the family asks for it."
    )
    seed: int = Field(0, description="Seed of the draw.")

    @model_validator(mode="after")
    def _axes(self) -> Dress:
        if len(set(self.axes)) < len(self.axes):
            raise ValueError(f"dress.axes {list(self.axes)} names an axis twice: name each once")
        if isinstance(self.ratio, dict) and set(self.ratio) != set(self.axes):
            raise ValueError(
                f"dress.ratio names {sorted(self.ratio)} and dress.axes {sorted(self.axes)}: name the same axes in both"
            )
        return self

    def ratios(self, target: float) -> dict[Axis, float]:
        """Return the part of each axis that goes, `target` where the section names none."""
        if isinstance(self.ratio, dict):
            return {axis: self.ratio[axis] for axis in self.axes}
        return dict.fromkeys(self.axes, target if self.ratio is None else self.ratio)


class Objective(Section):
    """The weights of what is minimised. LM loss alone is the paper's objective."""

    lm: Weight = Field(0.5, description="Cross-entropy of the next token, on every token of the window.")
    kl: Weight = Field(0.5, description="KL divergence from the dense model's next-token distribution.")
    state: Weight = Field(3.0, description="Relative squared distance to the dense model's final hidden state.")

    @model_validator(mode="after")
    def _something(self) -> Objective:
        if self.lm + self.kl + self.state == 0:
            raise ValueError("lm, kl and state are all 0, so there is nothing to minimise: give one of them a weight")
        return self


class Lora(Section):
    """Low-rank adapters, merged into the weights at the end."""

    rank: Count = Field(16, description="Rank of the adapters.")
    alpha: Rate = Field(32, description="Scale of the adapters; the update is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapters' input.")


class Optimisation(Section):
    """What every training stage has."""

    steps: Count = Field(100, description="Optimizer steps.")
    batch_size: Count = Field(8, description="Windows an optimizer step.")
    micro_batch_size: Count | None = Field(
        None, description="Windows a forward pass; fewer than batch_size accumulates gradients. All when absent."
    )
    learning_rate: Rate | None = Field(
        None,
        description="AdamW's peak learning rate. When absent 1e-4 for adapters, and 0.08 / hidden width for whole weights: 2e-5 at the width of the papers' 7B models.",
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.03, description="The part of the steps over which the learning rate rises; it then falls linearly to 0."
    )
    weight_decay: Weight = Field(0.0, description="AdamW's weight decay.")
    clip: Rate = Field(1.0, description="Gradients are scaled down to this norm.")
    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        "adamw", description="adamw-8bit (bitsandbytes, CUDA) keeps the optimizer's state in a quarter of the memory."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto is bf16 where the hardware computes in it, else fp32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: slower, far less memory."
    )
    checkpoint_every: Count = Field(50, description="Optimizer steps between two checkpoints to the store.")
    seed: int = Field(0, description="Seed of the batches' order and of the adapters.")

    @model_validator(mode="after")
    def _whole_batches(self) -> Optimisation:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class Regularize(Optimisation):
    """The second regularisation: what the chosen layers and channels knew moves to the others before the cut."""

    schedule: Literal["anneal", "penalty", "none"] = Field(
        "anneal",
        description="anneal: the gates of what was chosen go from 1 to 0 while the rest trains; penalty: the papers' norms, of f(x) − x for layers and of the weights' slices for channels; none: no regularisation.",
    )
    anneal: Fraction | None = Field(
        None,
        description="The part of the steps over which the gates are annealed. When absent 0.15, and 0.05 where channels go and no layers.",
    )
    norm: Literal["l1", "l2"] = Field(
        "l2",
        description="Norm of the penalty, relative to the same norm of the layer's input, or of the slice before the training.",
    )
    strength: Weight = Field(1.0, description="λ2, the weight of the penalty.")
    ramp: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="The part of the steps over which λ2 rises from 0."
    )
    objective: Objective = Field(Objective(), description="What is minimised beside the penalty.")
    trainable: Literal["all", "lora"] = Field(
        "all", description="Train every parameter, or adapters that are merged before the cut."
    )
    lora: Lora = Field(Lora(), description="The adapters, where trainable is lora.")

    def annealing(self, layers: bool) -> float:
        """Return the part of the steps over which the gates are annealed, where `layers` go or channels alone."""
        return self.anneal or (0.15 if layers else 0.05)


class Recover(Optimisation):
    """LoRA recovery fine-tuning (RFT) of the pruned model."""

    enabled: bool = Field(False, description="Whether the pruned model is fine-tuned.")
    lora: Lora = Field(Lora(), description="The adapters.")
    validation: Fraction = Field(0.1, description="The part of the windows that is held out to stop early.")
    evaluate_every: Count = Field(20, description="Optimizer steps between two looks at the held-out windows.")
    patience: Count = Field(3, description="Looks without improvement before it stops.")


class Speed(Section):
    """Speed of prefill and decode, apart."""

    enabled: bool = Field(True, description="Whether speed is measured.")
    batches: tuple[Count, ...] = Field((1, 8, 64), description="Batch sizes.")
    prompt: Count = Field(512, description="Tokens of the prompt, in prefill and decode.")
    generate: Count = Field(32, description="Tokens decoded after the prompt.")
    repeats: Count = Field(
        5, description="Measured repetitions, after one warm-up; the median and the 90th percentile are reported."
    )


class Evaluate(Section):
    """What is measured, of every model in the same run."""

    perplexity: dict[Name, Text] = Field(
        description="The texts to report perplexity on, by name: one at least, and one of another domain says more.",
        min_length=1,
    )
    length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Tokens of a window; calibration.length when absent."
    )
    batch_size: Count = Field(8, description="Windows a forward pass.")
    controls: tuple[Literal["pruned-first", "dense-trained"], ...] = Field(
        (),
        description="pruned-first: the same layers removed first, then the same training. dense-trained: the dense model with the same training.",
    )
    tasks: tuple[str, ...] = Field((), description="Zero-shot tasks of lm-eval, such as piqa or hellaswag.")
    task_limit: Count | None = Field(None, description="Examples a task; all when absent.")
    speed: Speed = Field(Speed(), description="Speed of prefill and decode.")


class Promote(Section):
    """The rules a candidate must hold to become challenger. Ratios of perplexity hold for every text; a missing or NaN value fails."""

    perplexity_over_dense: Rate | None = Field(
        None, description="The candidate's perplexity over the dense model's, at most."
    )
    perplexity_over_control: Rate | None = Field(
        None, description="The candidate's perplexity over the pruned-first control's, at most."
    )
    perplexity_over_champion: Rate | None = Field(
        None, description="The candidate's perplexity over the present champion's, at most; holds where there is none."
    )
    parameters_over_dense: Rate | None = Field(
        None, description="The candidate's parameters over the dense model's, at most."
    )
    prefill_speedup: Rate | None = Field(
        None, description="The candidate's prefill throughput over the dense model's, at least, at every batch."
    )
    decode_speedup: Rate | None = Field(
        None, description="The candidate's decode throughput over the dense model's, at least, at every batch."
    )


class Recipe(Section):
    """How a release is recompressed."""

    method: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Which method chooses what is removed; [trsp, dress] removes layers and channels in one run."
    )
    target: Target = Field(description="How much is removed.")
    calibration: Calibration = Field(description="The text that chooses and trains.")
    gates: Gates = Field(Gates(), description="TRSP's gates.")
    dress: Dress = Field(Dress(), description="DReSS's channels.")
    regularize: Regularize = Field(Regularize(), description="The training before the cut.")
    recover: Recover = Field(Recover(), description="The training after the cut.")
    evaluate: Evaluate = Field(description="What is measured.")
    promote: Promote = Field(Promote(), description="The rules of the verdict.")

    @model_validator(mode="before")
    @classmethod
    def _evaluation_length(cls, value: Any) -> Any:
        """Fill `evaluate.length` in, so that the evaluation's key tells the length it used."""
        if (
            isinstance(value, dict)
            and isinstance(value.get("evaluate"), dict)
            and isinstance(value.get("calibration"), dict)
        ):
            evaluate = value["evaluate"]
            if evaluate.get("length") is None:
                length = value["calibration"].get("length", Calibration.model_fields["length"].default)
                value = value | {"evaluate": evaluate | {"length": length}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for method in self.methods:
            if method not in methods():
                raise ValueError(
                    f"method {method!r} is not known: use one of {', '.join(methods())}{_did_you_mean(method, methods())}"
                )
        if sum(method != "dress" for method in self.methods) > 1 or "dress" in self.methods[:-1]:
            raise ValueError(
                f"method is {list(self.methods)}: name one method, or one that removes layers and then dress, such as [trsp, dress]"
            )
        if "gates" in self.model_fields_set and "trsp" not in self.methods:
            raise ValueError(f"method {self.method!r} learns no gates: remove the section 'gates'")
        if "dress" in self.model_fields_set and "dress" not in self.methods:
            raise ValueError(
                f"method {self.method!r} chooses no channels: remove the section 'dress', or add dress to method"
            )
        if "dress" in self.methods and self.regularize.schedule == "penalty" and self.regularize.trainable == "lora":
            raise ValueError(
                "regularize.schedule penalty takes dress's slices of the weights to 0, which adapters do not train: "
                "set regularize.trainable to all, or the schedule to anneal"
            )
        if self.regularize.schedule == "none" and self.evaluate.controls:
            raise ValueError(
                "evaluate.controls compares with training, but regularize.schedule is none: set evaluate.controls to []"
            )
        if self.promote.perplexity_over_control is not None and "pruned-first" not in self.evaluate.controls:
            raise ValueError("promote.perplexity_over_control needs its control: add pruned-first to evaluate.controls")
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in their order."""
        return (self.method,) if isinstance(self.method, str) else self.method

    def lengths(self) -> dict[str, int]:
        """Every number of tokens that a model of this recipe must be able to read, by its field."""
        speed = self.evaluate.speed
        asked = {"calibration.length": self.calibration.length, "evaluate.length": self.evaluate.length or 0}
        return asked | ({"evaluate.speed.prompt + generate": speed.prompt + speed.generate} if speed.enabled else {})

    def texts(self) -> Iterator[tuple[str, Text]]:
        """Every text of the recipe with its dotted name."""
        yield "calibration.data", self.calibration.data
        for name, text in self.evaluate.perplexity.items():
            yield f"evaluate.perplexity.{name}", text

    def with_texts(self, texts: dict[str, str]) -> Recipe:
        """Return the recipe with each text of `texts` (dotted name → path or reference) in its place."""
        settings = self.model_dump(mode="json", exclude_unset=True)
        for name, path in texts.items():
            section, leaf = _descend(settings, name)
            section[leaf] = {"path": path, "field": dict(self.texts())[name].field}
        return Recipe.model_validate(settings)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, the fields that were set only, so that `from_yaml` gives an equal recipe back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, overrides: Sequence[str] = ()) -> Recipe:
        """Parse a recipe and apply `dotted.key=value` overrides, each value read as YAML; null takes the field out again.

        Raises:
            Refusal: the YAML cannot be read, a field is unknown or its value is not allowed.
        """
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise Refusal(f"the recipe is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(settings, dict):
            raise Refusal(
                "the recipe is not a mapping of sections: start from one of the shipped recipes (espalier recipes)"
            )
        for override in overrides:
            _override(settings, override)
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise Refusal(_sentence(error, settings)) from None

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file. Raises Refusal where there is none, and what `from_yaml` raises."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise Refusal(
                f"the recipe {path} cannot be read ({why}): name a YAML file or a shipped recipe (espalier recipes)"
            ) from None
        return cls.from_yaml(text, overrides)


def plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections of a recipe as data that JSON and YAML can hold."""
    return {
        name: part.model_dump(mode="json") if isinstance(part, BaseModel) else part for name, part in sections.items()
    }


def used(sections: Mapping[str, Any], method: str | Sequence[str]) -> dict[str, Any]:
    """Return sections of a recipe without those that its methods have no use for."""
    chosen = [method] if isinstance(method, str) else method
    return {name: part for name, part in sections.items() if _OWN.get(name) in (None, *chosen)}


_OWN = {"gates": "trsp", "dress": "dress"}
"""Sections of one method alone."""


def methods() -> tuple[str, ...]:
    """The methods there are, which choose what is removed: one file each in `components/lib/methods`."""
    folder = Path(__file__).parents[1] / "methods"
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules([str(folder)])))


def _descend(settings: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that holds the dotted name's last part, made where it is missing, and that part."""
    *path, leaf = dotted.split(".")
    for part in path:
        if not isinstance(settings.get(part), dict):
            settings[part] = {}
        settings = settings[part]
    return settings, leaf


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise Refusal(f"--set {override!r} has no value: write --set dotted.key=value")
    section, leaf = _descend(settings, key.strip())
    try:
        section[leaf] = _yaml_value(value)
    except yaml.YAMLError:
        raise Refusal(f"--set {key} has the value {value!r}, which is not YAML: quote it") from None
    if section[leaf] is None:
        del section[leaf]


def _yaml_value(text: str) -> Any:
    """YAML 1.1 reads 1e-4 as a string; a person means the number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sentence(error: ValidationError, settings: dict[str, Any]) -> str:
    """Put the first fault into one sentence, and say how many more there are."""
    faults = [(_place(fault, settings), fault) for fault in error.errors(include_url=False)]
    # A field of several types has a fault for each of them: what goes deepest is of the type that was meant.
    around = [found for found in faults if _on_one_way(found[0], faults[0][0])]
    loc, fault = max(around, key=lambda found: len(found[0]))
    place = ".".join(map(str, loc))
    if fault["type"] == "extra_forbidden":
        known = _fields_at(fault["loc"][:-1])
        said = f"the recipe's field {place!r} is not known{_did_you_mean(str(loc[-1]), known) or ': known there are ' + ', '.join(known)}"
    elif fault["type"] == "missing":
        said = f"the recipe's field {place!r} is missing: add it ({_fields_help(fault['loc'])})"
    elif fault["type"] == "value_error":
        said = f"the recipe's {place + ': ' if place else ''}{fault['ctx']['error']}"
    else:
        wanted = " or ".join(dict.fromkeys(_wanted(other["msg"]) for found, other in around if found == loc))
        said = f"the recipe's field {place!r} is {fault['input']!r}: {wanted}"
    more = len(faults) - len(around)
    return said + (f" (and {more} more)" if more else "")


def _place(fault: ErrorDetails, settings: Any) -> tuple[int | str, ...]:
    """Return where in the settings a fault lies, without the types that were tried, which pydantic names among the fields."""
    place: list[int | str] = []
    for part in fault["loc"]:
        if part in settings if isinstance(settings, dict) else isinstance(settings, list) and isinstance(part, int):
            place.append(part)
            settings = settings[part]
    return (*place, fault["loc"][-1]) if fault["type"] == "missing" else tuple(place)


def _on_one_way(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether one place lies at or inside the other."""
    return all(mine == theirs for mine, theirs in zip(one, other, strict=False))


def _wanted(message: str) -> str:
    """Say what pydantic expects in the words of YAML."""
    said = message[0].lower() + message[1:]
    said = said.replace("tuple", "list").replace("dictionary", "mapping").replace(" after validation", "")
    return re.sub(r" or instance of \w+", "", said)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {nearest[0]!r}?" if nearest else ""


def _model_at(loc: Sequence[int | str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Recipe
    for part in loc:
        field = model.model_fields.get(str(part)) if model else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        # A name in a mapping (evaluate.perplexity.NAME) is no field: stay with the mapping's model.
        model = found[0] if found else model if not field else None
    return model


def _fields_at(loc: Sequence[int | str]) -> list[str]:
    model = _model_at(loc)
    return list(model.model_fields) if model else []


def _fields_help(loc: Sequence[int | str]) -> str:
    model = _model_at(loc[:-1])
    field = model.model_fields.get(str(loc[-1])) if model else None
    return (field.description or "").rstrip(".") if field else "see docs/recipe.md"
