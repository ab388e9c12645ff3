"""The four kinds of error a user can meet, and the exit status each one leads to."""


class CausalVAEError(Exception):
    """A failure with a message for the user: what is wrong, where, and what to do.

    status: what the command exits with. 2 is a mistake in what was asked, 1 a failure while working.
    """

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class ConfigError(CausalVAEError):
    """What was asked for can't be: a flag, a value, a path, or two of them together."""


class VideoError(CausalVAEError):
    """One file can't be read as video. In training it is quarantined, elsewhere it ends the command."""


class WeightsError(CausalVAEError):
    """A checkpoint, its format or its keys are not what the model needs."""


class RunError(CausalVAEError):
    """The run's folder can't be used, or the run can't go on. Says status=1 where work was under way."""


def exit_status(error: CausalVAEError) -> int:
    """Exit status of a command that ended with this error."""
    return error.status
