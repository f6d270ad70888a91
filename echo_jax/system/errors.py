"""The root of every error that a user can put right: programs print its message in place of a traceback."""


class UserError(Exception):
    """Something is wrong that the user can put right; the message says what it is, with the value, and what to do."""


class ConfigError(UserError, ValueError):
    """A value of the config that cannot work, found before any work starts."""


# What programs print as one message. An OSError names its path.
USER_ERRORS = (UserError, OSError)
