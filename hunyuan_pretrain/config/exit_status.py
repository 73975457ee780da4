"""Exit statuses of commands and ranks, which launchers, schedulers and tests read, and the message about a stop.

Imports nothing, so a program that handles signals can use them as soon as it starts.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_MISTAKE = 2
"""A user's mistake, reported in a message."""
EXIT_STOPPED = 75
"""The run was told to stop and lost nothing; the same command resumes it. EX_TEMPFAIL."""
EXIT_INTERRUPTED = 130
"""A second Ctrl-C during training, any Ctrl-C elsewhere."""

STOPPED_BEFORE_FIRST_STEP = "stopped before the first step; nothing to save: the same command starts again"
