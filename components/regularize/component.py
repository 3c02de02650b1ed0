"""The Kubeflow face of regularize."""

from components.lib.stage.face import component


@component
def regularize(release: str, windows: str, selection: str, recipe: str, run: str) -> str:
    """Prepare the release for the removal of the selection. Takes and returns references; resumes from its checkpoints."""
    from components.regularize.stage import STAGE

    return STAGE.run(run, recipe, release=release, windows=windows, selection=selection)
