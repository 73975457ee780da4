"""Bytes on disk: training checkpoints, and their translation to and from what other programs load."""


class CheckpointError(ValueError):
    """A checkpoint or an export that cannot be written, read or trusted; the message says which and why."""
