"""The Kubeflow face of calibrate."""

from components.lib.stage.face import component


@component
def calibrate(release: str, recipe: str, run: str) -> str:
    """Draw windows of the calibration text. Takes and returns references."""
    from components.calibrate.stage import STAGE

    return STAGE.run(run, recipe, release=release)
