"""The grace period of a job: the time between a scheduler's request to stop and the end of the job, in which the ranks
finish their step and save."""

from __future__ import annotations

import math
import re

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.jobs.request import Request

SHORTEST_S = {"slurm": 300, "kubernetes": 600}
"""What `submit` asks a scheduler for at least. Elsewhere nothing ends a job but its user."""
MARGIN = 2
"""Over the planned time: it assumes what storage writes, which other jobs use too, and ranks also have to exit."""
SLURM_DEFAULT_S = 60
"""Where --signal has no time (man sbatch)."""


def needed_s(stop_s: float) -> int:
    """Whole minutes. stop_s: planned, from the request to a complete checkpoint."""
    return 60 * math.ceil(MARGIN * stop_s / 60)


def settle(request: Request, stop_s: float | None) -> tuple[int, str | None]:
    """Seconds of the job's grace period; and what to tell the user about it, if anything. stop_s: as in `needed_s`,
    None if there is no plan. Raises ConfigError if a Slurm job is told to stop as soon as it starts."""
    if request.place not in SHORTEST_S:
        return 0, None
    shortest = SHORTEST_S[request.place]
    needed = shortest if stop_s is None or request.is_doctor else max(shortest, needed_s(stop_s))
    own = _own_s(request)
    granted = needed if own is None else own
    text = _option(request, "time") or request.time
    limit = limit_s(text)
    if limit is not None and granted >= limit and not request.is_doctor:
        rule = f"the ranks are told to stop {granted} s before the limit, so they would stop at once"
        raise ConfigError("submit", [Problem("--time", text, rule, f"more than {granted} s")])
    if stop_s is None or request.is_doctor:
        return granted, None
    takes = f"by the plan, stopping and saving take up to {stop_s:.0f} s"
    if own is not None and own < needed_s(stop_s):
        name = f"--option signal={_option(request, 'signal')}"
        enough = f"signal={(_option(request, 'signal') or '').partition('@')[0]}@{needed}"
        return own, f"warning: {name}: {takes}, so the job may be killed before it has saved (--option {enough})"
    if own is None and granted > shortest:
        return granted, f"note: the job gets {granted} s to stop, instead of {shortest} s: {takes}"
    return granted, None


def _own_s(request: Request) -> int | None:
    """What --option signal=[{R|B}:]SIGNAL[@SECONDS] says. None without it, and for what only Slurm can judge."""
    if (text := _option(request, "signal")) is None:
        return None
    seconds = text.partition("@")[2] or str(SLURM_DEFAULT_S)
    return int(seconds) if seconds.isdecimal() else None


def _option(request: Request, name: str) -> str | None:
    """The last --option of this name, which counts."""
    found = [value for own, _, value in (text.partition("=") for text in request.options) if own == name]
    return found[-1] if found else None


def limit_s(text: str) -> int | None:
    """Seconds of a time limit as Slurm writes it: MINUTES[:SECONDS], HH:MM:SS, DAYS-HH[:MM[:SS]]. None: no limit, and
    for other words."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        return None
    days, has_days, rest = text.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if not has_days and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None
