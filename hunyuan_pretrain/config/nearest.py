"""Hints that name the nearest legal numbers."""

from __future__ import annotations


def nearest_multiples(value: int, step: int) -> str:
    """A hint with the multiples of `step` on both sides of `value`."""
    below = value // step * step
    return f"use {below} or {below + step}" if below else f"use {step}"


def nearest_divisors(value: int, number: int) -> str:
    """A hint with the divisors of `number` on both sides of `value`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return "use " + " or ".join(str(d) for d in below + above)


def nearest_even(width: int) -> str:
    """A hint with the even head widths on both sides of an odd one."""
    return "use a head width of 4" if width < 4 else f"use a head width of {width - 1} or {width + 1}"
