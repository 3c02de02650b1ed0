"""The Kubeflow face of control."""

from components.lib.stage.face import component


@component
def control(kind: str, release: str, windows: str, selection: str, recipe: str, run: str) -> str:
    """Train a control where the recipe asks for it; the empty reference where it does not.

    Args:
        kind: pruned-first (what was selected goes first, then the same training) or dense-trained (the same training alone).
    """
    from components.lib.stage.run import stage

    inputs = {"release": release, "windows": windows, "selection": selection}
    with stage(
        "control", run=run, recipe=recipe, sections=["regularize", "recover"], inputs=inputs, variant=kind
    ) as this:
        if kind not in this.recipe.evaluate.controls:
            this.hand_on("")
        elif this.pending:
            from components.control.control import control

            this.perform(control, resumes=True, kind=kind)
        return this.reference
