"""The Kubeflow face of regularize."""

from components.lib.stage.face import component


@component
def regularize(release: str, windows: str, selection: str, recipe: str, run: str) -> str:
    """Train the release so that what was selected can go. Takes and returns references; resumes from its checkpoints."""
    from components.lib.stage.run import stage

    inputs = {"release": release, "windows": windows, "selection": selection}
    with stage("regularize", run=run, recipe=recipe, sections=["regularize"], inputs=inputs) as this:
        if this.recipe.regularize.schedule == "none":
            this.hand_on("release")
        elif this.pending:
            from components.regularize.regularize import regularize

            this.perform(regularize, resumes=True)
        return this.reference
