"""The Kubeflow face of prune."""

from kfp.dsl import Model, Output

from components.lib.stage.face import component


@component
def prune(release: str, model: str, selection: str, recipe: str, run: str, checkpoint: Output[Model]) -> str:
    """Cut what was selected, export and verify. Takes and returns references; `checkpoint` shows them in the UI."""
    from components.lib.stage.run import stage

    inputs = {"release": release, "model": model, "selection": selection}
    with stage(
        "prune",
        run=run,
        recipe=recipe,
        sections=["method", "target", "calibration", "gates", "dress", "regularize"],
        inputs=inputs,
    ) as this:
        if this.pending:
            from components.prune.prune import prune

            made = this.store.manifest(this.inputs["release"])
            lineage = {**made.metadata, "digest": made.digest}
            this.perform(prune, lineage=lineage)
        this.show(checkpoint)
        return this.reference
