"""Write the report, register the candidate, and make it challenger if the rules hold."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.lib.provenance.signature import UNSIGNED, sign
from components.lib.provenance.verify import REQUIRED
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.stage.code import code_of_everything
from components.lib.stage.declaration import read_files
from components.lib.stage.events import reported
from components.lib.store.runs import item_of, leave_unregistered
from components.lib.store.store import Manifest, Reference, Store
from components.lib.tracking import registry, runs
from components.lib.tracking.origin import commit, program
from components.register.description import PICTURE, describe, drawn_text, methods_with_ratios, ratios
from components.register.figures import pareto_file
from components.register.measured import Context
from components.register.page import render
from components.register.provenance import Source, papers
from components.register.report import Registered, Report, build, read_curves
from components.register.searched import target_sentence

EVALUATION = "sha256.evaluation"
"""The tag with the reference of the evaluation that the version's LoggedModel was made of."""

ADAPTER_BASE = "espalier.adapter_base"
"""The tag with the reference of the model that the version's adapters belong to."""

SMALL = {
    "selection": ["selection.json", "choice.json", "search.json", "*.jsonl"],
    "evaluation": ["evaluation.json"],
    "regularized": ["metrics.jsonl"],
    "candidate": ["metrics.jsonl", "model/README.md"],
}
"""What the report is drawn from, of each stage's output: never a checkpoint."""


def references_of(outputs: Mapping[str, str]) -> dict[str, Reference]:
    """Return the outputs there are, by name; an output that a stage passed through has the names of both."""
    return {name: Reference.parse(text) for name, text in outputs.items() if text}


def register_run(name: str, run: str, recipe: str, outputs: Mapping[str, str], page: str) -> str:
    """Register what a run made, and leave its report in the store, in MLflow and at `page`.

    Registering is idempotent: the same checkpoint is the same version, whose evidence is brought up to date.

    Args:
        name: the registered model's name; nothing is registered if it is empty, as for the cells of a comparison.
        run: the run's label; the report lies at `runs/<run>/` in the store.
        recipe: the pinned recipe's YAML.
        outputs: the stages' references.
        page: where the HTML report is written, for Kubeflow's user interface.

    Returns:
        What is to be done with the version: `fail` and `pass`, nothing; `promote`, make it champion.
    """
    with reported("register", run) as events, tempfile.TemporaryDirectory(prefix="espalier-") as scratch:
        store = Store.from_environment()
        references = references_of(outputs)
        manifests = {output: store.manifest(reference) for output, reference in references.items()}
        folders = {output: _small(store, output, outputs, Path(scratch)) for output in SMALL}
        parsed = parse_recipe(recipe)
        signature = sign(references["candidate"], store) if name else UNSIGNED
        draft = build(
            release=_release(references["release"], manifests["release"]),
            recipe=parsed,
            selection=folders["selection"],
            evaluation=folders["evaluation"],
            registered=None,
            timing=_timing(run, manifests),
            environment=_environment(parsed, folders["evaluation"], manifests),
            signature=signature,
        )
        made = Made(references["candidate"], references["evaluation"], manifests)
        registered = _register(name, run, made, draft) if name and draft.verdict.target_holds else None
        report = draft.model_copy(update={"registered": registered})
        if name and registered is None:
            leave_unregistered(run, target_sentence(report), store)
        recovered = folders["candidate"] if outputs["candidate"] != outputs["pruned"] else None
        curves = read_curves(
            parsed, selection=folders["selection"], regularize=folders["regularized"], recover=recovered
        )
        html = render(report, curves)
        _leave(store, run, report, html, page)
        if registered:
            for file, text in _papers(store, name, references["candidate"], folders["candidate"], report).items():
                store.write_text(f"runs/{run}/{file}", text)
        runs.record_reused(run, _made_by_stages(manifests))
        events.finish(verdict=report.verdict.word)
        return decision(report)


def decision(report: Report) -> str:
    """Return what the pipeline does with the version: `fail` and `pass`, nothing; `promote`, make it champion."""
    approved = report.verdict.passed and report.parsed_recipe().promote.approval == "auto"
    waits = report.registered is not None and "champion" not in report.registered.aliases
    return "promote" if approved and waits else report.verdict.word


def _small(store: Store, output: str, outputs: Mapping[str, str], scratch: Path) -> Path:
    """Fetch the named output's small files, those of them that it has."""
    reference = Reference.parse(outputs[output])
    wanted = [file.name for file in read_files(store.manifest(reference), SMALL[output]).files]
    folder = scratch / output
    if wanted:
        return store.get(reference, folder, wanted)
    folder.mkdir()
    return folder


def _papers(store: Store, name: str, candidate: Reference, folder: Path, report: Report) -> dict[str, str]:
    """Return the model card with the results, and the bill of materials."""
    card = folder / "model" / "README.md"
    made = {text: store.manifest(Reference.parse(path)).metadata for text, path in _texts(report).items()}
    sources = {text: Source(str(one["source"]), one.get("revision")) for text, one in made.items() if "source" in one}
    written = card.read_text() if card.is_file() else ""
    return papers(report, name=name, digest=candidate.digest, candidate_card=written, sources=sources)


def _texts(report: Report) -> dict[str, str]:
    """Return the references of the texts that perplexity was measured on, by name."""
    prefix = "evaluate.perplexity."
    texts = {field: str(path) for field, path in report.environment["texts"].items()}
    return {field.removeprefix(prefix): path for field, path in texts.items() if field.startswith(prefix)}


def _release(reference: Reference, manifest: Manifest) -> dict[str, Any]:
    return {
        "source": manifest.metadata["source"],
        "revision": manifest.metadata["revision"],
        "digest": reference.digest,
        "changed": tuple(_changed(manifest.metadata)),
    }


def _changed(snapshot: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was changed of a release when it was pinned."""
    if "gguf" in snapshot:
        yield f"unpacked from a GGUF file with weights in {snapshot['gguf']}"
    if "heads" in snapshot:
        count = len(snapshot["heads"])
        yield f"without its heads for multi-token prediction ({count} tensor{'s' if count > 1 else ''})"
    if "dequantised" in snapshot:
        yield f"dequantised from {snapshot['dequantised'].upper()} to bf16"
    if "taken_out_of" in snapshot:
        yield f"the text model alone of a {snapshot['taken_out_of']}"


def _made_by_stages(manifests: Mapping[str, Manifest]) -> dict[str, dict[str, Any]]:
    made = [manifest.metadata for manifest in manifests.values() if "stage" in manifest.metadata]
    made.sort(key=lambda one: one.get("began", 0.0))
    return {f"{one['stage']} {one['variant']}".strip(): one for one in made}


def _timing(run: str, manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """Seconds of each stage's work when it was made, and of this run from its first stage until now."""
    timing = {name: float(made["seconds"]) for name, made in _made_by_stages(manifests).items()}
    parent = runs.find_parent(run)
    total = time.time() - parent.info.start_time / 1000 if parent else sum(timing.values())
    return {**timing, "total": round(total, 3)}


def _environment(recipe: Recipe, evaluation: Path, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    context = json.loads((evaluation / "evaluation.json").read_text()).get("context", {})
    texts = {dotted: text.path for dotted, text in recipe.texts()}
    code = {name: made["code"] for name, made in _made_by_stages(manifests).items()}
    return {**context, "texts": texts, "code": {**code, "all": code_of_everything()}}


@dataclass(frozen=True)
class Made:
    """The outputs of a run, of which a version is registered."""

    candidate: Reference
    evaluation: Reference
    manifests: Mapping[str, Manifest]
    """Of the run's outputs, by name."""

    @property
    def before_recovery(self) -> str:
        """The reference of the pruned model that LoRA-RFT began with."""
        return str(self.manifests["candidate"].metadata["inputs"]["model"])

    def compared_with(self, recipe: Recipe) -> str:
        """Return the digest of the champion that the candidate was compared with, or that no rule compares, or that there was none."""
        if not any(rule.against == "champion" for rule in recipe.promote.rules.values()):
            return registry.ANY
        champion = self.manifests["evaluation"].metadata.get("inputs", {}).get("models/champion")
        return Reference.parse(champion).digest if champion else registry.NONE


def _register(name: str, run: str, made: Made, report: Report) -> Registered:
    """Register the version, set or take away `challenger`, and tie its numbers to their data sets."""
    run_id = _parent_id(run)
    evaluation = str(made.evaluation)
    version = registry.register_version(name, made.candidate, run_id, _evidence(run, made, report))
    registry.describe(version, describe(report, run_id))
    if version.tags.get(EVALUATION) != evaluation or "espalier.logged_model" not in version.tags:
        model_id = registry.log_model_evidence(name, run_id, {"espalier.version": version.version}, _measured(report))
        registry.tag_version(version, {EVALUATION: evaluation, "espalier.logged_model": model_id})
    if not report.verdict.passed:
        registry.drop_alias(name, "challenger", version.version)
    elif "champion" not in version.aliases:
        registry.set_alias(name, "challenger", version.version)
    version = registry.version_of(name, version.version)
    return Registered(name=name, version=version.version, aliases=version.aliases, source=version.source)


def _evidence(run: str, made: Made, report: Report) -> dict[str, str]:
    """Return a version's tags: its origin, how to make it again, its verdict, and the item that it was made for.

    MLflow shows tags in the order in which they were set: words and figures stand before digests.
    """
    item = item_of(run, Store.from_environment())
    recipe = report.parsed_recipe()
    digests = {
        "release": report.release.digest,
        "key": made.manifests["candidate"].metadata.get("key"),
        "code": report.environment["code"].get("all"),
        **{f"text.{name}": digest for name, digest in Context.asked(recipe).digests.items()},
    }
    figures = {
        f"perplexity.{text}": f"{value:.4g} (dense {report.dense.perplexity.get(text) or float('nan'):.4g})"
        for text, value in report.candidate.perplexity.items()
        if value is not None
    }
    return {
        "espalier.verdict": report.verdict.word,
        "espalier.failed": ", ".join(rule.name for rule in report.verdict.failed) or "none",
        **figures,
        "espalier.release": report.release.source,
        "espalier.revision": str(report.release.revision),
        "espalier.method": report.selection.method,
        "espalier.ratio": methods_with_ratios(report),
        "espalier.removed": removed(report),
        **({ADAPTER_BASE: made.before_recovery} if recipe.recover.keep_adapter else {}),
        "espalier.run": run,
        "espalier.version": program(),
        "espalier.commit": commit() or "unknown",
        "espalier.signature": report.verdict.signature,
        REQUIRED: str(report.recipe["promote"]["require_signature"]).lower(),
        "espalier.recipe": json.dumps(report.recipe)[:4900],
        **{f"sha256.{name}": digest for name, digest in digests.items() if digest},
        registry.COMPARED: made.compared_with(recipe),
        **({f"{registry.ITEM}.{item}": "made"} if item else {}),
    }


def removed(report: Report) -> str:
    """Name the layers that went, and count the channels: a tag holds 8,000 characters, and a model has more channels than that."""
    layers = ", ".join(map(str, report.selection.removed))
    return "; ".join(
        f"layers {layers}" if removal.axis == "layers" else f"{removal.axis} {removal.removed} of {removal.before}"
        for removal in report.removals()
    )


def _measured(report: Report) -> dict[str, tuple[float, str, str]]:
    """The candidate's perplexities with the data sets they were measured on."""
    digests = {name: str(text).rpartition(":")[2] for name, text in report.environment["texts"].items()}
    return {
        f"perplexity.{text}": (value, text, digests[f"evaluate.perplexity.{text}"])
        for text, value in report.candidate.perplexity.items()
        if value is not None
    }


def _leave(store: Store, run: str, report: Report, html: str, page: str) -> None:
    """Put the report in its places: the store, the parent run in MLflow, and Kubeflow's artifact."""
    store.write_text(f"runs/{run}/report.json", report.to_json())
    store.write_text(f"runs/{run}/report.html", html)
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    Path(page).write_text(html)
    files = {"report.json": report.to_json(), "report.html": html}
    text = drawn_text(report.models())
    if text is not None:
        files[PICTURE] = pareto_file(report.models(), text)
    runs.leave_report(run, files, _summary(report), describe(report, _parent_id(run)))


def _parent_id(run: str) -> str:
    """Return the parent run's id in MLflow; empty if there is none."""
    parent = runs.find_parent(run)
    return parent.info.run_id if parent else ""


def _summary(report: Report) -> dict[str, float]:
    """The parent run's metrics: ratios to the dense model, then each model's size and perplexities, as MLflow sorts them."""
    summary = {f"candidate over dense/{name}": value for name, value in ratios(report).items()}
    for name, model in report.models().items():
        summary[f"{name}/parameters"] = model.parameters
        summary |= {f"{name}/perplexity.{text}": value for text, value in model.perplexity.items() if value is not None}
    return summary
