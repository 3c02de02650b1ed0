"""The one exception a person is meant to read."""


class Refusal(Exception):
    """Something the person can put right.

    The message is one sentence that names the field or the file, the value found there, and the cure. The command line
    prints it without a traceback; every other exception is a fault of ours or of the machine, and keeps its traceback.
    """
