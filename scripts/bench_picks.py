"""Block selections for benchmarks: their speed depends on how far neighbouring tokens agree."""

from __future__ import annotations

import random

import numpy as np
from jaxtyping import Float, Int


def replaced_picks(
    length: int,
    kv_heads: int,
    selected: int,
    block_size: int,
    *,
    fraction: float = 0.05,
    initial: int = 1,
    recent: int = 2,
    seed: int = 0,
) -> Int[np.ndarray, "1 T K P"]:
    """Selections that drift: from a token to the next, ``fraction`` of the P picks is replaced.

    The ``initial`` first and ``recent`` latest blocks are always listed, so the other picks carry
    all the replacements: each is exchanged with probability ``fraction P / (P - forced)``.
    Ascending, -1 trailing, as the ops want them.
    """
    rng = random.Random(seed)
    rate = fraction * selected / max(selected - initial - recent, 1)
    indices = np.full((1, length, kv_heads, selected), -1, np.int32)
    for head in range(kv_heads):
        free: list[int] = []
        for t in range(length):
            own = t // block_size
            forced = _forced(own, selected, initial, recent)
            first, stop = initial, own - recent + 1
            eligible = max(stop - first, 0)
            wanted = min(selected - len(forced), eligible)
            kept = [block for block in free if rng.random() >= rate]
            while len(kept) < wanted:
                block = first + rng.randrange(eligible)
                if block not in kept:
                    kept.append(block)
            free = kept
            blocks = sorted(forced.union(free))
            indices[0, t, head, : len(blocks)] = blocks
    return indices


def uniform_picks(
    length: int,
    kv_heads: int,
    selected: int,
    block_size: int,
    *,
    initial: int = 1,
    recent: int = 2,
    seed: int = 0,
) -> Int[np.ndarray, "1 T K P"]:
    """Every token draws its blocks anew: neighbours agree on the forced ones only (worst case)."""
    rng = np.random.default_rng(seed)
    indices = np.full((1, length, kv_heads, selected), -1, np.int32)
    for start in range(0, length, block_size):
        own = start // block_size
        stop = min(start + block_size, length)
        forced = sorted(_forced(own, selected, initial, recent))
        eligible = np.arange(initial, max(own - recent + 1, initial), dtype=np.int32)
        wanted = min(selected - len(forced), len(eligible))
        rows = (stop - start) * kv_heads
        drawn = np.argsort(rng.random((rows, len(eligible))), axis=1)[:, :wanted]
        blocks = np.concatenate(
            [np.broadcast_to(np.array(forced, np.int32), (rows, len(forced))), eligible[drawn]], 1
        )
        shape = (stop - start, kv_heads, blocks.shape[1])
        indices[0, start:stop, :, : blocks.shape[1]] = np.sort(blocks, axis=1).reshape(shape)
    return indices


def _forced(own: int, selected: int, initial: int, recent: int) -> set[int]:
    latest = list(range(own, max(own - recent, -1), -1))[:selected]
    first = [block for block in range(min(initial, own + 1)) if block not in latest]
    return set(latest + first[: selected - len(latest)])


def union_ratio(indices: Int[np.ndarray, "B T J P"], tile: int = 16) -> float:
    """Mean over tiles of ``tile`` tokens of |union of their blocks| / P."""
    batch, length, lists, selected = indices.shape
    padded = np.full((batch, -(-length // tile) * tile, lists, selected), -1, np.int32)
    padded[:, :length] = indices
    tiles = padded.reshape(batch, -1, tile, lists, selected).swapaxes(2, 3)
    flat = np.sort(tiles.reshape(-1, tile * selected), axis=1)
    distinct = (np.diff(flat, axis=1) != 0).sum(axis=1) + 1 - (flat[:, 0] < 0)
    return float(distinct.mean() / selected)


def replaced_fraction(indices: Int[np.ndarray, "B T J P"]) -> float:
    """Mean share of a token's blocks that the token before it did not list."""
    before, after = indices[:, :-1], indices[:, 1:]
    old = (after[..., :, None] == before[..., None, :]).any(axis=-1)
    listed = after >= 0
    return float((listed & ~old).sum() / max(listed.sum(), 1))


def drifting(
    shape: tuple[int, int, int, int], memory: float, seed: int
) -> Float[np.ndarray, "B T N H"]:
    """Unit normal noise whose value at a token is ``memory`` times that of the token before + new.

    ``memory`` 0 draws every token anew. Queries like these select blocks that drift.
    """
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if memory:
        from scipy.signal import lfilter  # large, and most users of this file need it not

        noise[:, 1:] *= (1 - memory**2) ** 0.5
        noise = lfilter([1.0], [1.0, -memory], noise, axis=1)
    return noise.astype(np.float32)
