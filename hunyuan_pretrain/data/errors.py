"""The error of this package."""


class DataFormatError(ValueError):
    """A file, folder or setting of the data that a user can put right: the message names it, the rule and the nearest
    right value."""
