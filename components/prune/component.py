"""The Kubeflow face of prune."""

from kfp.dsl import Model, Output

from components.lib.stage.face import component


@component
def prune(release: str, model: str, selection: str, recipe: str, run: str, checkpoint: Output[Model]) -> str:
    """Cut the selection, export and verify. Takes and returns references; `checkpoint` shows them in the user interface."""
    from components.prune.stage import STAGE

    return STAGE.run(run, recipe, show=checkpoint, release=release, model=model, selection=selection)
