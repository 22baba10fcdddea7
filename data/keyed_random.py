"""Randomness that is a pure function of (seed, purpose, numbers): no state, no order of calls, no process."""

import zlib

import numpy as np


def keyed_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Returns a fresh generator that depends on its arguments alone."""
    return np.random.Generator(_philox(seed, purpose, numbers))


def keyed_permutation(length: int, seed: int, purpose: str, *numbers: int) -> np.ndarray:
    """Returns a permutation of 0 … length - 1 that depends on the arguments alone, (length,) int64.

    It sorts the raw output of Philox, which numpy keeps stable for ever; numpy's own `permutation` may change.
    """
    return np.argsort(_philox(seed, purpose, numbers).random_raw(length), kind="stable")


def keyed_integer(bound: int, seed: int, purpose: str, *numbers: int) -> int:
    """Returns an integer in [0, bound) that depends on the arguments alone (uniform to 2^-64 · bound)."""
    return int(_philox(seed, purpose, numbers).random_raw()) % bound


def _philox(seed: int, purpose: str, numbers: tuple[int, ...]) -> np.random.Philox:
    if seed < 0:
        raise ValueError(f"seed={seed}: must not be negative")
    entropy = (seed, zlib.crc32(purpose.encode()), *numbers)
    return np.random.Philox(key=np.random.SeedSequence(entropy).generate_state(2, np.uint64))
