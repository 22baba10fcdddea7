"""The exception for mistakes that a user of the models can mend."""


class ModelError(ValueError):
    """A user's mistake about a model: the message is one line and names what, where and the remedy.

    Attributes:
        exit_code: What the command line exits with (2 = a user's mistake).
    """

    exit_code = 2
