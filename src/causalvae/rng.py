"""The only place where numbers come from chance: functions of a key, with no generator state to save.

A key names what the number is for, such as `key("noise", seed, cursor, sample, frame)`. The same key gives
the same numbers in any process, in any order, with any number of workers.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

FEISTEL_ROUNDS = 4


def key(*parts: str | int) -> int:
    """A 64-bit key from tagged parts: blake2b, so that ("a", 1) and ("a1",) differ."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode("utf-8", "surrogateescape")
        digest.update(struct.pack("<I", len(text)) + text)
    return int.from_bytes(digest.digest(), "little")


def below(base: int, n: int) -> int:
    """A number in [0, n), uniform to 2**-64 * n."""
    return key("below", base) * n >> 64


def permuted(i: int, n: int, base: int) -> int:
    """Where position i of a shuffled list of n goes, without the list: a Feistel network, walked until it
    is in range.

    For a fixed base this is a permutation of range(n).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (key("feistel", base, turn, right) & mask)
        i = left << half | right
        if i < n:
            return i


def generator(base: int) -> torch.Generator:
    """A CPU generator for one draw. Only 32 bits of a CPU seed count, so the key is folded."""
    return torch.Generator().manual_seed((base ^ base >> 32) & 0xFFFFFFFF)


def normal(shape: Sequence[int], base: int) -> Tensor:
    """Standard normal numbers of this shape, fp32, drawn on the CPU so that every device gets the same."""
    return torch.randn(tuple(shape), generator=generator(base))


def integers(shape: Sequence[int], *, n: int, base: int) -> Tensor:
    """Integers in [0, n), int64, drawn on the CPU."""
    return torch.randint(n, tuple(shape), generator=generator(base))
