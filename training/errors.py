"""The error that means: the user can fix this, and the message says how."""


class TrainingError(ValueError):
    """A user's mistake met while training. One line: what, where, the remedy."""

    exit_code = 2


class Preempted(Exception):
    """The scheduler asked the run to stop; a checkpoint was saved and the same command resumes."""

    exit_code = 75
