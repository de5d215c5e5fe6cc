"""The one kind of error that is the user's."""


class BadInput(ValueError):
    """The user's input is wrong. The message says what, where, and what to do about it.

    A script that ends with it prints this message in one line, and no traceback.
    """
