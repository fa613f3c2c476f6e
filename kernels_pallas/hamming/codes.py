"""The packed form of binary codes, of sums of them, and the compact form of a selection by them.

Bit i of a code sits in bit i % 32 of word i // 32; bits past the last one are 0.

The Hamming distance to G query codes, summed, is a weighted count of bits: of c codes that have
bit i set, a key pays c if its bit is not and G - c if it is, so

    sum_g popcount(q_g ^ k) = sum_i min(c_i, G - c_i) + sum_i x_i |G - 2 c_i|

with x = k ^ (the majority of the q_g). The weights are even or odd as G is; written in binary, a
key costs log2 G counts of masked bits instead of G.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped, UInt32

WORD = 32
"""Bits of a word."""


class Threshold(NamedTuple):
    """A selection by score in O(1) numbers a list: the score and the position of its worst key.

    ``level`` and ``cutoff`` [B, T, J] int32: a candidate s is selected iff score > level, or
    score == level and s >= cutoff (of equals the most recent are taken). An empty selection has
    the highest possible score as level and the number of keys as cutoff.
    """

    level: Int[Array, "B T J"]
    cutoff: Int[Array, "B T J"]

    def selects(
        self, scores: Shaped[Array, "B T J S"], positions: Int[Array, " S"]
    ) -> Bool[Array, "B T J S"]:
        """Which keys pass; the caller leaves out those that are no candidates.

        ``scores`` may be of any dtype that holds them exactly.
        """
        level = self.level[..., None].astype(scores.dtype)
        late = positions[None, None, None, :] >= self.cutoff[..., None]
        return (scores > level) | ((scores == level) & late)


class SummedCodes(NamedTuple):
    """G codes as one weighted count of bits; see the formula of this module.

    The distance of a key is constant + (G % 2) n(x) + sum_d 2^(d + 1) n(x & masks[d]), where x is
    key ^ majority and n counts the bits of all its words.
    """

    majority: UInt32[Array, "*rest W"]
    masks: tuple[UInt32[Array, "*rest W"], ...]
    constant: Int[Array, "*rest"]


def sum_codes(q_codes: UInt32[Array, "*rest G W"], bits: int) -> SummedCodes:
    """The sum of the G codes."""
    group = q_codes.shape[-2]
    ones = jnp.sum(code_signs(q_codes, bits, jnp.int32) > 0, axis=-2, dtype=jnp.int32)
    half = jnp.abs(group - 2 * ones) // 2
    digits = [(half >> digit) & 1 for digit in range(mask_count(group))]
    return SummedCodes(
        pack_codes(2 * ones > group),
        tuple(pack_codes(digit == 1) for digit in digits),
        jnp.sum(jnp.minimum(ones, group - ones), axis=-1, dtype=jnp.int32),
    )


def mask_count(group: int) -> int:
    """Masks of the sum of ``group`` codes: binary digits of its halved weights."""
    return (group // 2).bit_length()


def word_count(bits: int) -> int:
    """W, the words of a code of ``bits`` bits."""
    return -(-bits // WORD)


def pack_codes(bits: Bool[Array, "*rest b"]) -> UInt32[Array, "*rest W"]:
    """Pack bits into words."""
    width = bits.shape[-1]
    words = word_count(width)
    padding = [*([(0, 0)] * (bits.ndim - 1)), (0, words * WORD - width)]
    lanes = jnp.pad(bits, padding).reshape(*bits.shape[:-1], words, WORD).astype(jnp.uint32)
    shift = jnp.arange(WORD, dtype=jnp.uint32).reshape(*(1 for _ in lanes.shape[:-1]), WORD)
    return jnp.sum(lanes << shift, axis=-1, dtype=jnp.uint32)


def code_signs(
    codes: UInt32[Array, "*rest W"], bits: int, dtype: Any = jnp.float32
) -> Shaped[Array, "*rest b"]:
    """The code as numbers: +1 for a bit that is set, -1 for one that is not."""
    shift = jnp.arange(WORD, dtype=jnp.uint32).reshape(*(1 for _ in codes.shape), WORD)
    lanes = (codes[..., None] >> shift) & jnp.uint32(1)
    lanes = lanes.reshape(*codes.shape[:-1], codes.shape[-1] * WORD)[..., :bits]
    return jnp.where(lanes == 1, 1, -1).astype(dtype)
