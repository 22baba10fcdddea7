"""The error that evaluation raises for a user's mistake."""


class EvalError(ValueError):
    """A user's mistake met while evaluating: one line that says what, where, and the remedy."""

    exit_code = 2
