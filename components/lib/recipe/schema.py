"""The typed recipe: one YAML file, checked completely before anything starts.

A recipe says how a release is recompressed; the release and the registered model's name are arguments of the run. The
description of every field is its documentation: `docs/recipe.md` is written from these types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from components.lib.recipe.choices import Methods
from components.lib.recipe.promotion import Promote, Rule
from components.lib.recipe.section import Count, Name, Section, descend
from components.lib.recipe.target import LIMIT, Target
from components.lib.recipe.training import Recover, Regularize


class Text(Section):
    """A text: a `.txt`, `.jsonl` or `.parquet` file, an `s3://` object, or a Hub data set. A string alone is a `path`."""

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


class Corpus(Text):
    """A text that may be too large to copy."""

    stream: bool = Field(
        False,
        description="Read the text where it lies, part by part, instead of copying it into the store: a folder of parquet files on S3 (path: s3://bucket/folder), or a Hub data set kept in parquet files.",
    )

    @model_validator(mode="after")
    def _streamed_from_afar(self) -> Corpus:
        if self.stream and self.path is not None and not self.path.startswith("s3://"):
            raise ValueError(
                f"stream is true, and path {self.path!r} is on this machine: name an s3:// folder of parquet files or a Hub data set, or set stream to false"
            )
        return self


class Calibration(Section):
    """The text on which layers and channels are chosen and models are trained."""

    data: Corpus = Field(description="The text the windows are drawn from.")
    samples: Count = Field(
        128, description="How many windows are drawn, on which layers and channels are chosen and transfers are fitted."
    )
    training_samples: Count | None = Field(
        None,
        description="How many further windows are drawn for the trainings alone, kept in files that are read one after the other. When absent the trainings read the samples.",
    )
    length: Annotated[int, Field(ge=8)] = Field(2048, description="Tokens in one window.")
    seed: int = Field(0, description="Seed of the draw.")


PROTOCOLS: dict[str, dict[str, Any]] = {
    "latency": {"batches": [1], "prompt": 2048, "generate": 0, "repeats": 50},
    # The first of 128 tokens comes with the prompt's pass.
    "throughput": {"batches": [64], "prompt": 64, "generate": 127, "repeats": 10},
}
"""The protocols of the papers on removing layers, by name."""


class Speed(Section):
    """The measurement of prefill speed and decode speed."""

    enabled: bool = Field(True, description="Whether speed is measured.")
    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="The program that runs the models: transformers in the stage itself, or vLLM's server, asked by vLLM's own benchmark, with every batch size as the number of concurrent requests. ESPALIER_VLLM_PYTHON names the interpreter of an environment that has vLLM.",
    )
    protocol: Literal["latency", "throughput"] | None = Field(
        None,
        description="The papers' protocol, which replaces the four fields below. latency: batch 1, a prompt of 2048 tokens, 50 times. throughput: batch 64, 64 tokens in, 128 out, 10 times.",
    )
    batches: tuple[Count, ...] = Field((1, 8, 64), description="Batch sizes.")
    prompt: Count = Field(512, description="Tokens of the prompt, in prefill and decode.")
    generate: Annotated[int, Field(ge=0)] = Field(
        32, description="Tokens decoded after the prompt and the first token; 0: decode is not measured."
    )
    repeats: Count = Field(
        5, description="Measured repetitions, after one warm-up; the median and the 90th percentile are reported."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_protocol(cls, value: Any) -> Any:
        protocol = value.get("protocol") if isinstance(value, dict) else None
        return {**value, **PROTOCOLS[protocol]} if isinstance(protocol, str) and protocol in PROTOCOLS else value

    @property
    def length(self) -> int:
        """Tokens that a model must be able to read; vLLM counts the last generated one, which nothing reads."""
        return self.prompt + self.generate + (self.backend == "vllm")


class Evaluate(Section):
    """The measurements, made of every model in the same run."""

    perplexity: dict[Name, Text] = Field(
        description="The texts to report perplexity on, by name: at least one, better also one of another domain.",
        min_length=1,
    )
    length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Tokens of a window; calibration.length when absent."
    )
    batch_size: Count = Field(8, description="Windows a forward pass.")
    controls: tuple[Literal["pruned-first", "dense-trained"], ...] = Field(
        (),
        description="pruned-first: the same cut made first, without a transfer, then the same training. dense-trained: the dense model with the same training.",
    )
    tasks: tuple[str, ...] = Field(
        (),
        description="Zero-shot tasks: names of lm-eval's tasks and groups, such as piqa; task files (.yaml), and folders of them, written with a /. Files are stored with the data that they name.",
    )
    continuations: Count | None = Field(
        None,
        description="Questions made of each text of perplexity: which of four continuations is the true one? A task for domains without a benchmark; none when absent.",
    )
    task_limit: Count | None = Field(None, description="Examples a task; all when absent.")
    prompts: tuple[str, ...] = Field(
        (),
        description="Prompts that every model continues greedily, shown side by side in the report.",
    )
    remote_code: bool = Field(
        False,
        description="Whether Python code that comes with task files (!function) may run, and metrics that lm-eval lacks be fetched.",
    )
    speed: Speed = Field(Speed(), description="Speed of prefill and decode.")

    @property
    def named_tasks(self) -> tuple[str, ...]:
        """Return the tasks that lm-eval knows by their names."""
        return tuple(task for task in self.tasks if task not in self.task_files)

    @property
    def task_files(self) -> tuple[str, ...]:
        """Return the tasks that are files, folders or, in a pinned recipe, references."""
        return tuple(task for task in self.tasks if "/" in task or task.endswith((".yaml", ".yml")))


class Recipe(Section):
    """How a release is recompressed."""

    text_only: bool = Field(
        False,
        description="Whether the text model of a release of images and text is taken out of it when it is pinned: the result is a model of text alone. A release of text alone stays as it is.",
    )
    methods: Methods = Field(
        description="The methods that choose layers or channels to remove, each with its own settings; a method of layers and one of channels may be combined."
    )
    calibration: Calibration = Field(
        description="The text on which layers and channels are chosen and models are trained."
    )
    target: Target | None = Field(
        None,
        description="The quality, speed or size that is asked for instead of a ratio; the methods' ratios are then the deepest cut that is tried.",
    )
    regularize: Regularize = Field(Regularize(), description="The training before the cut.")
    recover: Recover = Field(Recover(), description="The training after the cut.")
    evaluate: Evaluate = Field(description="The measurements.")
    promote: Promote = Field(
        Promote(), description="The rules of the verdict, and who makes a candidate champion that passes them."
    )

    @model_validator(mode="before")
    @classmethod
    def _evaluation_length(cls, value: Any) -> Any:
        """Fill `evaluate.length` in, so that the evaluation's key contains the length that it used."""
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

    @model_validator(mode="before")
    @classmethod
    def _search(cls, value: Any) -> Any:
        """With a target, fill in its transfer, so that the key of the search contains it, and the ratios that are not named."""
        if not isinstance(value, dict) or not isinstance(value.get("target"), dict):
            return value
        regularize, methods = value.get("regularize"), value.get("methods")
        transfer = regularize.get("transfer") if isinstance(regularize, dict) else None
        if transfer is not None:
            value = value | {"target": {"transfer": transfer} | value["target"]}
        if isinstance(methods, dict):
            filled = {
                name: {"ratio": LIMIT} | settings if isinstance(settings, dict) else settings
                for name, settings in methods.items()
            }
            value = value | {"methods": filled}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for method in self.methods.chosen:
            method.check_training(self.regularize)
        if self.regularize.schedule == "none" and self.evaluate.controls:
            raise ValueError(
                "evaluate.controls compares with training, but regularize.schedule is none: set evaluate.controls to []"
            )
        if self.target and self.target.figure == "accuracy" and not self.evaluate.tasks:
            raise ValueError("target.min_accuracy_recovery needs tasks to be confirmed on: name them in evaluate.tasks")
        if self.target and self.target.figure == "prefill" and not self.evaluate.speed.enabled:
            raise ValueError("target.min_speedup needs a measured speed: set evaluate.speed.enabled to true")
        for name, rule in self.promote.rules.items():
            self._check_rule(f"promote.rules.{name}", rule)
        return self

    def _check_rule(self, place: str, rule: Rule) -> None:
        """Raise ValueError if the evaluation will not measure what the rule compares."""
        if rule.against in ("pruned-first", "dense-trained") and rule.against not in self.evaluate.controls:
            raise ValueError(f"{place} needs its control: add {rule.against} to evaluate.controls")
        measured = {
            "perplexity": ("evaluate.perplexity", tuple(self.evaluate.perplexity)),
            "prefill": ("evaluate.speed.batches", tuple(map(str, self.evaluate.speed.batches))),
            "decode": ("evaluate.speed.batches", tuple(map(str, self.evaluate.speed.batches))),
        }
        field, names = measured.get(rule.figure, ("", rule.on))
        for name in rule.on:
            if name not in names:
                raise ValueError(f"{place}.on names {name!r}, which {field} does not have: it has {', '.join(names)}")

    @property
    def removes_layers(self) -> bool:
        """Return True if a method removes layers."""
        return any(method.removes == "layers" for method in self.methods.chosen)

    def lengths(self) -> dict[str, int]:
        """Return every number of tokens that a model of this recipe must be able to read, by its field."""
        speed = self.evaluate.speed
        asked = {"calibration.length": self.calibration.length, "evaluate.length": self.evaluate.length or 0}
        return asked | ({"evaluate.speed.prompt + generate": speed.length} if speed.enabled else {})

    def texts(self) -> Iterator[tuple[str, Text]]:
        """Yield every text of the recipe with its dotted name."""
        yield "calibration.data", self.calibration.data
        for name, text in self.evaluate.perplexity.items():
            yield f"evaluate.perplexity.{name}", text

    def with_texts(self, texts: dict[str, str]) -> Recipe:
        """Return the recipe with each text of `texts` (dotted name → path or reference) in its place."""
        settings = self.model_dump(mode="json", exclude_unset=True)
        for name, path in texts.items():
            section, leaf = descend(settings, name)
            section[leaf] = {"path": path, "field": dict(self.texts())[name].field}
        return Recipe.model_validate(settings)

    def with_tasks(self, tasks: Mapping[str, str]) -> Recipe:
        """Return the recipe with each task of `tasks` (path → reference) replaced."""
        settings = self.model_dump(mode="json", exclude_unset=True)
        if tasks:
            settings["evaluate"]["tasks"] = [tasks.get(task, task) for task in self.evaluate.tasks]
        return Recipe.model_validate(settings)

    def with_ratios(self, ratios: Mapping[str, float | dict[str, float]]) -> Recipe:
        """Return the recipe with the ratio of each named method in its place."""
        settings = self.model_dump(mode="json", exclude_unset=True)
        for method, ratio in ratios.items():
            settings["methods"][method]["ratio"] = ratio
        return Recipe.model_validate(settings)

    def to_yaml(self) -> str:
        """Return the recipe as YAML with only the fields that were set; `parse_recipe` gives an equal recipe back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)
