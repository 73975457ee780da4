"""Exit statuses of commands and ranks, which launchers, schedulers and tests read; the signals and message of a stop.

Imports nothing that takes time, so a program that handles signals can use them as soon as it starts.
"""

from __future__ import annotations

import signal

EXIT_DONE = 0
EXIT_MISTAKE = 2
"""A user's mistake, reported in a message."""
EXIT_STOPPED = 75
"""The run was told to stop and lost nothing; the same command resumes it. EX_TEMPFAIL."""
EXIT_INTERRUPTED = 130
"""A second Ctrl-C during training, any Ctrl-C elsewhere."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Requests to save and stop. Schedulers send SIGTERM, or SIGUSR1 where so told (sbatch --signal=USR1@300)."""
COMMAND = "HUNYUAN_COMMAND"
"""Environment variable in which a launcher tells the ranks the command that started the run."""
LAUNCHER = "HUNYUAN_LAUNCHER_PID"
"""Environment variable in which a launcher tells the ranks its process id."""
STOPPED_BEFORE_FIRST_STEP = "stopped before the first step; nothing to save: the same command starts again"
