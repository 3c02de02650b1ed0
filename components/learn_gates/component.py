"""The Kubeflow face of learn_gates."""

from components.lib.stage.face import component


@component
def learn_gates(release: str, windows: str, recipe: str, run: str) -> str:
    """Let the recipe's methods choose what is removed. Takes and returns references."""
    from components.learn_gates.stage import STAGE

    return STAGE.run(run, recipe, release=release, windows=windows)
