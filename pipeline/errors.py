"""The two exceptions that the command line prints as one line without a traceback.

Any other exception is a bug in this program and keeps its traceback.
"""


class UserError(Exception):
    """Invalid input. The message is one line: where, what is wrong with which value, and the fix.

    Exit code 2.
    """


class JobError(Exception):
    """The job failed although its input is valid; running the same command again may succeed.

    Exit code 1.
    """
