"""Pin everything that a run reads, and open the run."""

from __future__ import annotations

from components.lib.checks import check_speed
from components.lib.recipe.loading import parse_recipe
from components.lib.stage.events import reported
from components.lib.store.runs import leave_uses
from components.lib.store.store import Reference, Store
from components.lib.tracking import registry, runs
from components.pin.pin import pin_files, pin_release
from components.pin.tasks import check_loadable


def pin_run(release: str, recipe: str, name: str, run: str) -> tuple[str, str, str]:
    """Return the release's reference, the pinned recipe's YAML, and the champion's reference (empty if there is none)."""
    with reported("pin", run):
        store = Store.from_environment()
        parsed = parse_recipe(recipe)
        check_speed(parsed.evaluate.speed)
        pinned = pin_files(parsed, store)
        texts = {dotted: str(text.path) for dotted, text in pinned.texts()}
        check_loadable(pinned.evaluate, store)
        reference = pin_release(release, parsed, store)
        leave_uses(run, "pin", [reference, *texts.values(), *pinned.evaluate.task_files], store)
        made = store.manifest(reference).metadata
        tags = {
            "espalier.release": str(made.get("source")),
            "espalier.revision": str(made.get("revision")),
            "sha256.release": reference.digest,
            "espalier.name": name,
            **{f"espalier.text.{dotted}": text for dotted, text in texts.items()},
            **({"espalier.tasks": " ".join(pinned.evaluate.tasks)} if pinned.evaluate.task_files else {}),
        }
        run_id = runs.open_parent(run, tags, pinned.model_dump(mode="json"))
        for dotted, text in texts.items():
            section, *_, last = dotted.split(".")
            called = last if section == "evaluate" else section
            runs.log_data(run_id, {called: Reference.parse(text)}, context=section)
        champion = registry.aliased(name, "champion") if name else None
        return str(reference), pinned.to_yaml(), str(champion.reference) if champion else ""
