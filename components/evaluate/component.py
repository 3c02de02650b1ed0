"""The Kubeflow face of evaluate."""

from kfp.dsl import Metrics, Output

from components.lib.stage.face import component


@component
def evaluate(models: dict, recipe: str, run: str, measured: Output[Metrics]) -> str:
    """Measure every model in one process.

    Args:
        models: references by name, such as dense and candidate; an empty one stands for a model that this run does not have.
    """
    from components.evaluate.stage import STAGE

    return STAGE.run(run, recipe, show=measured, models=models)
