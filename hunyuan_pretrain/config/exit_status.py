"""How a command or a rank ends: statuses that launchers, schedulers and tests read, and what is said of a stop.

Needs nothing, so that a program that listens for signals has them from its first moments.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_MISTAKE = 2
"""A user's mistake, which has been told in a message."""
EXIT_STOPPED = 75
"""The run was told to stop, lost nothing, and goes on by the same command; EX_TEMPFAIL."""
EXIT_INTERRUPTED = 130
"""A second Ctrl-C during training, any Ctrl-C elsewhere."""

STOPPED_BEFORE_FIRST_STEP = "stopped before the first step; nothing to save: the same command starts again"
