"""The Kubeflow face of learn_gates."""

from components.lib.stage.face import component


@component
def learn_gates(release: str, windows: str, recipe: str, run: str) -> str:
    """Let the recipe's method choose what is removed. Takes and returns references."""
    from components.lib.stage.run import stage

    inputs = {"release": release, "windows": windows}
    with stage(
        "learn_gates", run=run, recipe=recipe, sections=["method", "target", "gates", "dress"], inputs=inputs
    ) as this:
        if this.pending:
            from components.learn_gates.choose import choose

            this.perform(choose)
        return this.reference
