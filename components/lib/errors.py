"""The exceptions that the command line puts into words."""


class Refusal(Exception):
    """Something the person can put right.

    The message is one sentence that names the field or the file, the value found there, and the cure. The command line
    prints it without a traceback; every other exception is a fault of ours or of the machine, and keeps its traceback.
    """


class Unavailable(Refusal):
    """A refusal that may pass by itself: a service that does not answer, a disk that is full, access not yet granted.

    Every other refusal lasts until the release, the recipe or the code changes, so a watcher does not try it again.
    """


class StageFailed(Exception):
    """A stage of the pipeline ended in a fault that is not the person's to put right."""
