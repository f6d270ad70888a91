"""The root of every error that a user can mend: programs print its message in place of a traceback."""


class UserError(Exception):
    """Something is wrong that the user can put right; the message says what it is, with the value, and what to do."""


# What programs print as one message. An OSError names its path.
USER_ERRORS = (UserError, OSError)
