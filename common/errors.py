"""The errors a person may see, each with the exit code that the command line gives it.

Everything a user can cause is a `TwintuneError`: the command line prints its message alone, without a
traceback. Any other exception is a bug of ours and keeps its traceback.
"""


class TwintuneError(Exception):
    """Carry one message for the person at the terminal: where, what was found, what to do."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Let a notebook show the message alone; IPython asks for it by this name."""
        return [f"{type(self).__name__}: {self}"]


class UserError(TwintuneError):
    """Report input that is wrong: config, data, files or options."""

    exit_code = 2


class OwnCodeError(TwintuneError):
    """Report what a Python function of the user's raised, or returned that it shouldn't."""


class DiskError(UserError):
    """Report a disk that is full or can't be written; what was there before is as it was."""


class MachineError(TwintuneError):
    """Report a thing this machine can't do: memory, a missing device or package."""

    exit_code = 3


class Interrupted(TwintuneError):
    """Report a run stopped by a signal whose checkpoint is saved."""

    exit_code = 130
