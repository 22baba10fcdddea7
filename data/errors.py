"""The one exception class that tells a user what is wrong with data, a path or a store."""


class DataError(ValueError):
    """A user's mistake or a damaged file: one line that says what, where, and the remedy."""

    exit_code = 2
