"""What a user of the command line can get wrong."""


class ConfigError(ValueError):
    """A user's mistake in a recipe, an override or an option; the message is one line with the remedy."""

    exit_code = 2
