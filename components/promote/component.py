"""The Kubeflow face of promote."""

from components.face import component


@component
def promote(name: str, version: str = "") -> str:
    """Make a registered version champion (the challenger when `version` is empty). Returns the version."""
    from components.promote.promote import promote
    from components.stage import telling

    with telling("promote"):
        return promote(name, version).version
