"""The one exception that means "your input": the command line prints it as one line and exits with code 2."""


class UserError(Exception):
    """What is wrong, where, the value received, and the fix, in one line."""
