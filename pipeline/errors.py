"""The two exceptions that the command line prints as one line, without a traceback; anything else
raised is a fault.
"""


class UserError(Exception):
    """What is wrong with the input, where, the value received, and the fix, in one line. Exit code
    2.
    """


class JobError(Exception):
    """The job cannot go on though nothing is wrong with the input; the same command may do better.
    Exit code 1.
    """
