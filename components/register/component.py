"""The Kubeflow face of register."""

from kfp.dsl import HTML, Output

from components.lib.stage.face import component


@component
def register(
    name: str,
    run: str,
    recipe: str,
    release: str,
    windows: str,
    selection: str,
    regularized: str,
    pruned: str,
    candidate: str,
    pruned_first: str,
    dense_trained: str,
    evaluation: str,
    report: Output[HTML],
) -> str:
    """Write the report, register the candidate, and make it challenger where the rules hold. Returns the verdict: pass or fail."""
    from components.register.run import Outputs, register_run

    outputs = Outputs(
        release, windows, selection, regularized, pruned, candidate, pruned_first, dense_trained, evaluation
    )
    return register_run(name, run, recipe, outputs, report.path)
