"""The Kubeflow face of evaluate."""

from kfp.dsl import Metrics, Output

from components.lib.stage.face import component


@component
def evaluate(
    dense: str,
    candidate: str,
    champion: str,
    pruned_first: str,
    dense_trained: str,
    recipe: str,
    run: str,
    measured: Output[Metrics],
) -> str:
    """Measure every model in one process. Takes and returns references; an empty one is a model this run does without."""
    from components.evaluate.run import inputs_of
    from components.lib.stage.run import stage

    models = {
        "dense": dense,
        "candidate": candidate,
        "champion": champion,
        "pruned-first": pruned_first,
        "dense-trained": dense_trained,
    }
    with stage("evaluate", run=run, recipe=recipe, sections=["evaluate"], inputs=inputs_of(models, recipe)) as this:
        if this.pending:
            from components.evaluate.run import evaluate_run

            digests = {name: reference.digest for name, reference in this.inputs.items()}
            this.perform(evaluate_run, digests=digests)
        this.show(measured)
        return this.reference
