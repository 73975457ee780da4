"""The nearest legal numbers, as hints of refusals."""

from __future__ import annotations


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`, as a hint."""
    below = value // step * step
    return f"use {below} or {below + step}" if below else f"use {step}"


def nearest_divisors(value: int, number: int) -> str:
    """The divisors of `number` on both sides of `value`, as a hint."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return "use " + " or ".join(str(d) for d in below + above)


def nearest_even(width: int) -> str:
    """The even head widths on both sides of one that is odd, as a hint."""
    return "use a head width of 4" if width < 4 else f"use a head width of {width - 1} or {width + 1}"
