"""The Kubeflow face of control."""

from components.lib.stage.face import component


@component
def control(kind: str, release: str, windows: str, selection: str, recipe: str, run: str) -> str:
    """Train a control if the recipe asks for it; return the empty reference if it does not.

    Args:
        kind: pruned-first (the selection is removed first, then the same training) or dense-trained (the same training alone).
    """
    from components.control.stage import STAGE

    return STAGE.run(run, recipe, variant=kind, release=release, windows=windows, selection=selection)
