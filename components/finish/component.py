"""The Kubeflow face of finish."""

from kfp.dsl import PipelineTaskFinalStatus

from components.lib.stage.face import component


@component
def finish(run: str, status: PipelineTaskFinalStatus) -> None:
    """End the run in MLflow with the state that Kubeflow reports."""
    from components.lib.stage.events import reported
    from components.lib.store.runs import leave_end
    from components.lib.tracking.runs import close_parent

    with reported("finish"):
        leave_end(run, succeeded=status.state == "SUCCEEDED")
        close_parent(run, succeeded=status.state == "SUCCEEDED")
