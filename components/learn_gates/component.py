"""The Kubeflow face of learn_gates."""

from components.lib.stage.face import component


@component
def learn_gates(release: str, windows: str, recipe: str, run: str) -> str:
    """Choose the layers and channels to remove by the recipe's methods. Takes and returns references."""
    from components.learn_gates.stage import STAGE

    return STAGE.run(run, recipe, release=release, windows=windows)
