"""The Kubeflow face of finish."""

from kfp.dsl import PipelineTaskFinalStatus

from components.face import component


@component
def finish(run: str, status: PipelineTaskFinalStatus) -> None:
    """End the run in MLflow with the state that Kubeflow reports."""
    from components.runs import leave_end
    from components.stage import telling
    from components.tracking import close_parent

    with telling("finish") as tell:
        leave_end(run, succeeded=status.state == "SUCCEEDED")
        close_parent(run, succeeded=status.state == "SUCCEEDED")
        tell("done")
