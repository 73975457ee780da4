"""A seeded shuffle that is computed row by row, so that nothing is stored and every rank agrees whatever its numpy
version."""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mixed_key(*numbers: int) -> int:
    """One well-mixed 64-bit number from several integers; the order counts."""
    key = 0
    for number in numbers:
        key = int(_mix(np.array([(key + number) % 2**64], dtype=np.uint64) + _STEP)[0])
    return key


def permuted(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where the permutation of range(size) that belongs to `key` sends each of `index`: int64, same shape.

    A Feistel network permutes the next power of two; a value that falls outside `size` is sent on until it is inside,
    which keeps it a permutation of range(size). Cost is the same for any size.
    """
    if size < 2:
        return np.zeros_like(index, dtype=np.int64)
    bits = max(2, (size - 1).bit_length())
    round_keys = _mix(np.uint64(key) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _STEP)
    out = _feistel(index.ravel().astype(np.uint64), bits, round_keys)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], bits, round_keys)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64).reshape(index.shape)


def shuffled(size: int, key: int) -> np.ndarray:
    """A permutation of range(size) that belongs to `key`, all of it: (size,) uint32. Another one than that of
    `permuted`, and faster.

    The numbers are sorted by a random number each; the number itself breaks ties, so that every numpy sorts them alike.
    8 bytes a number.
    """
    assert size <= 2**32, "numbers of 32 bits"
    # Through _mix twice, lest the keys 1, 2, 3... give shifted versions of one sequence of random numbers.
    first = _mix(np.array([key], dtype=np.uint64) + _STEP)
    order = np.arange(size, dtype=np.uint64)
    for begin in range(0, size, 2**18):
        number = order[begin : begin + 2**18]
        number |= _mix(first + number * _STEP) >> np.uint64(32) << np.uint64(32)
    order.sort()
    return order.astype(np.uint32)


def _feistel(value: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    low_bits, high_bits = bits // 2, bits - bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
    low, high = value & low_mask, value >> np.uint64(low_bits)
    for number, key in enumerate(round_keys):
        # The halves may differ by a bit, so they are changed in turn and never swapped.
        if number % 2 == 0:
            high = high ^ (_mix(low ^ key) & high_mask)
        else:
            low = low ^ (_mix(high ^ key) & low_mask)
    return (high << np.uint64(low_bits)) | low


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
