"""The Kubeflow face of calibrate."""

from components.lib.stage.face import component


@component
def calibrate(release: str, recipe: str, run: str) -> str:
    """Draw windows of the calibration text. Takes and returns references."""
    from components.lib.recipe.schema import Recipe
    from components.lib.stage.run import stage

    text = Recipe.from_yaml(recipe).calibration.data.path or ""
    inputs = {"release": release, "text": text}
    with stage("calibrate", run=run, recipe=recipe, sections=["calibration"], inputs=inputs) as this:
        if this.pending:
            from components.calibrate.windows import calibrate

            this.perform(calibrate)
        return this.reference
