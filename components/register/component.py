"""The Kubeflow face of register."""

from kfp.dsl import HTML, Output

from components.lib.stage.face import component


@component
def register(
    name: str,
    run: str,
    recipe: str,
    outputs: dict,
    report: Output[HTML],
) -> str:
    """Write the report, register the candidate, and make it challenger if the rules hold.

    Args:
        name: the registered model's name; nothing is registered if it is empty.
        outputs: the references of the run's stages by name; an empty one is an output that this run does without.

    Returns:
        What the pipeline does with the version: `fail` and `pass`, nothing; `promote`, make it champion. It is the task's only
        output, because kfp.local resolves no other in a condition.
    """
    from components.register.run import register_run

    return register_run(name, run, recipe, outputs, report.path)
