"""The exceptions that the command line reports as sentences."""


class Refusal(Exception):
    """An error that the user can correct.

    The message is one sentence that names the field or the file, the value found there, and the cure. The command line
    prints it without a traceback; every other exception is an error of this program or of the machine, and keeps its traceback.
    """


class Unavailable(Refusal):
    """A refusal that may be temporary: a service that does not answer, a disk that is full, access not yet granted.

    Every other refusal lasts until the release, the recipe or the code changes, so a watcher does not retry it.
    """


class StageFailed(Exception):
    """A stage of the pipeline failed with an error that the user cannot correct."""
