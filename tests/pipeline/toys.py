"""Pipelines of one small stage. kfp reads annotations as types, so that they are not postponed here."""

from kfp import dsl

toy = dsl.component(base_image="python", install_kfp_package=False)


@toy
def nothing(run: str) -> None:
    """Stand for a last stage: nobody takes its output."""


@toy
def refuses() -> None:
    """Stand for a stage that said why it ended, and whose exit code was lost all the same."""
    print('@espalier {"stage": "pin", "event": "refused", "message": "the release is not to be had: name another"}')


@toy
def dies() -> None:
    """Stand for a stage that the system kills for its memory."""
    import os
    import signal

    print('@espalier {"stage": "evaluate", "event": "opened"}', flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@dsl.pipeline(name="last")
def last(release: str, recipe: str, name: str, run: str):  # type: ignore[no-untyped-def]
    """Take what the real pipeline takes."""
    nothing(run=run)


@dsl.pipeline(name="refusing")
def refusing():  # type: ignore[no-untyped-def]
    """Refuse."""
    refuses()


@dsl.pipeline(name="silent")
def silent():  # type: ignore[no-untyped-def]
    """Die."""
    dies()
