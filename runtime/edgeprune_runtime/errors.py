"""The one error a user can cause.

    Exception
      └─ EdgepruneError   one line: which value, what was expected, what to do next; the command line exits with 2
           └─ GateError   a parity or quality gate said no; the command line exits with 1

Anything else that escapes is a bug and shows its traceback.
"""


class EdgepruneError(Exception):
    """Something the user can put right. The message is one line: which value, what was expected, what to do next."""

    exit_code = 2


class GateError(EdgepruneError):
    """A check that guards the result failed: the result is not written, or the verdict is negative."""

    exit_code = 1
