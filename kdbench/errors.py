"""The one exception that a user's own mistake raises: printed as a message, never as a traceback."""


class UserError(ValueError):
    """Something the user typed or pointed at cannot work. The message names the key, the value and what is allowed."""
