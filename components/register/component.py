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
    """Write the report, register the candidate, and make it challenger if the rules hold. Returns the verdict: pass or fail.

    Args:
        name: the registered model's name; nothing is registered if it is empty.
        outputs: the references of the run's stages by name; an empty one is an output that this run does without.
    """
    from components.register.run import register_run

    return register_run(name, run, recipe, outputs, report.path)
