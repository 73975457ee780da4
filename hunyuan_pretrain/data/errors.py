"""The error of this package."""


class DataFormatError(ValueError):
    """A data file, folder or setting that the user can correct. The message names it, the rule and the nearest valid
    value."""
