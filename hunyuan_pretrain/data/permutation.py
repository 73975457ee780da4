"""A seeded shuffle computed row by row: nothing is stored, and all ranks agree whatever their numpy versions."""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mixed_key(*numbers: int) -> int:
    """One well-mixed 64-bit number from several integers. Their order matters."""
    key = 0
    for number in numbers:
        key = int(_mix(np.array([(key + number) % 2**64], dtype=np.uint64) + _STEP)[0])
    return key


def permuted(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """The image of each of `index` under the permutation of range(size) given by `key`: int64, same shape.

    A Feistel network permutes the next power of two. A value outside range(size) is permuted again until it is inside,
    which keeps the result a permutation of range(size). The cost is the same for any size.
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
    """The whole permutation of range(size) given by `key`: (size,) uint32. It is not the one of `permuted`, and faster.

    Each number is sorted by a random key. The number itself breaks ties, so every numpy version sorts them alike. Takes
    8 bytes per number.
    """
    assert size <= 2**32, "numbers of 32 bits"
    # Mixed twice, or the keys 1, 2, 3... would give shifted versions of the same random sequence.
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
        # The halves may differ in width by one bit, so they are updated in turn and never swapped.
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
