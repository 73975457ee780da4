"""Training checkpoints on disk, and their conversion to and from the formats that other programs load."""


class CheckpointError(ValueError):
    """A checkpoint or an export that cannot be written, read or trusted; the message says which and why."""
