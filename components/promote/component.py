"""The Kubeflow face of promote."""

from components.lib.stage.face import component


@component
def promote(name: str, version: str = "") -> str:
    """Make a registered version champion (the challenger when `version` is empty). Returns the version."""
    from components.lib.stage.events import reported
    from components.promote.promote import promote

    with reported("promote"):
        return promote(name, version).version
