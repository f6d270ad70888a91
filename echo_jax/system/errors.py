"""The base class of every error that a user can fix: programs print its message instead of a traceback."""


class UserError(Exception):
    """The user can fix this error; the message says what is wrong, with the value, and what to do."""


class ConfigError(UserError, ValueError):
    """A value of the config that cannot work, found before any work starts."""


# Programs print these as one message. An OSError names its path.
USER_ERRORS = (UserError, OSError)
