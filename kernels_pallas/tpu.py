"""What the Mosaic TPU kernels share: how rows and keys lie in memory, the softmax, the streaming.

Layout. Head widths are padded to whole vector lanes (Hp), so that the heads of a token lie side by
side: queries are [B, T, N * Hp], keys [B, S, K * Hp], and a kv head is a lane-aligned slice that
copies can address. A tile is Tq consecutive tokens with the G query heads of one kv head: M =
Tq * G matrix rows in the order (head, token), padded to Mp, whole lanes.

Orientation. Logits are [keys, rows]: a row's statistics, limits and bits are then a lane vector
[1, Mp] in all three kernels (forward, dq, dk/dv) and no reduction crosses lanes.

Axes beside the project's alphabet: A head groups with rows of their own (K, or N where every query
head has its own list), M matrix rows of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Num

LANES = 128
TOKEN_STEP = 16  # rows of a packed bfloat16 register: tokens of a tile come in multiples of it
LIMITS = 2  # statistics of a row: lse, delta, then its limits
STATISTIC_ROWS = 8  # a register is 8 sublanes high, fewer rows would take the same memory
VMEM_LIMIT = 32 * 2**20
"""What a kernel may ask for; the three generations have 64 MiB or more."""

# Masked logits and the initial maximum. The maximum starts above what a mask writes, so a row
# that has seen nothing yet gets exp2(MASKED - START) = 0 and needs no second mask.
MASKED = -2e30
START = -1e30
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``size``."""
    return -(-size // unit) * unit


def chip_kind() -> str:
    """Kind of the TPU that is traced for, "" if there is none.

    That of the surrounding mesh's device (ahead-of-time compilation), else of the first device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""


def check_arrays(op: str, **arrays: Array) -> None:
    """Raise ``NotImplementedError`` unless all arrays are nonempty, float32 or all bfloat16."""
    dtypes = {str(array.dtype) for array in arrays.values()}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        named = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise NotImplementedError(
            f"{op} on TPUs takes float32 or bfloat16, one for all, not {named}; "
            "cast, or use implementation='xla'"
        )
    for name, array in arrays.items():
        if 0 in array.shape:
            raise NotImplementedError(
                f"{op} on TPUs needs a nonempty {name}, not {array.shape}; use implementation='xla'"
            )


def check_vmem(op: str, needed: int, sizes: str) -> None:
    """Raise ``NotImplementedError`` if a kernel would not fit into vector memory."""
    if needed > VMEM_LIMIT:
        raise NotImplementedError(
            f"{op} with {sizes} needs {needed / 2**20:.1f} MiB of vector memory of "
            f"{VMEM_LIMIT // 2**20}; use smaller tiles or implementation='xla'"
        )


def compiler_params(
    semantics: Sequence[Literal["parallel", "arbitrary"]],
) -> pltpu.CompilerParams:
    """Compiler parameters of every kernel; ``semantics`` names the grid axes' dependences."""
    return pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=VMEM_LIMIT)


# --- Arrays as the kernels read them (outside the kernels) ---


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Sizes of the query side, and the moves between the public layout and tiles.

    Attributes:
      batch, queries: B and T.
      lists: A, groups of query heads that form tiles together.
      group: query heads in such a group.
      tokens: Tq, tokens of a tile, a multiple of :data:`TOKEN_STEP`.
    """

    batch: int
    queries: int
    lists: int
    group: int
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens % TOKEN_STEP:
            raise ValueError(f"tokens={self.tokens} of a tile must be a multiple of {TOKEN_STEP}")

    @property
    def tiles(self) -> int:
        """Tiles of one sequence and head group."""
        return -(-self.queries // self.tokens)

    @property
    def padded(self) -> int:
        """Tokens of whole tiles."""
        return self.tiles * self.tokens

    @property
    def matrix_rows(self) -> int:
        """M padded to whole lanes."""
        return round_up(self.tokens * self.group, LANES)

    def pack(self, x: Float[Array, "B T N X"]) -> Float[Array, "B Tp NXp"]:
        """Heads side by side; added tokens and lanes are zero."""
        return side_by_side(x, self.padded)

    def unpack(self, x: Float[Array, "B Tp NXp"], width: int) -> Float[Array, "B T N X"]:
        """Inverse of :meth:`pack`."""
        heads = self.lists * self.group
        return x.reshape(self.batch, self.padded, heads, -1)[:, : self.queries, :, :width]

    def per_row(self, x: Num[Array, "B T N"]) -> Num[Array, "BA tiles 1 Mp"]:
        """A number per token and query head, in the order of matrix rows; added rows are 0."""
        x = jnp.pad(x, ((0, 0), (0, self.padded - self.queries), (0, 0)))
        x = x.reshape(self.batch, self.tiles, self.tokens, self.lists, self.group)
        x = jnp.transpose(x, (0, 3, 1, 4, 2))
        return self._whole_lanes(x.reshape(self.batch * self.lists, self.tiles, 1, -1), 0)

    def per_token(self, x: Int[Array, "B T"], fill: int) -> Int[Array, "B tiles 1 Mp"]:
        """A number per token, for every matrix row of it; added rows are ``fill``."""
        x = jnp.pad(x, ((0, 0), (0, self.padded - self.queries)), constant_values=fill)
        x = x.reshape(self.batch, self.tiles, 1, self.tokens)
        x = jnp.broadcast_to(x, (self.batch, self.tiles, self.group, self.tokens))
        return self._whole_lanes(x.reshape(self.batch, self.tiles, 1, -1), fill)

    def _whole_lanes(self, x, fill):
        added = self.matrix_rows - x.shape[3]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, added)), constant_values=fill)

    def from_rows(self, x: Num[Array, "BA tiles 1 Mp"]) -> Num[Array, "B T N"]:
        """Inverse of :meth:`per_row`."""
        x = x[:, :, 0, : self.group * self.tokens]
        x = x.reshape(self.batch, self.lists, self.tiles, self.group, self.tokens)
        x = jnp.transpose(x, (0, 2, 4, 1, 3)).reshape(self.batch, self.padded, -1)
        return x[:, : self.queries]


def stack_rows(*rows: Int[Array, "E tiles 1 Mp"]) -> Int[Array, "E tiles 8 Mp"]:
    """Rows of one tile on top of each other, filled up to a register's height."""
    stacked = jnp.concatenate(rows, axis=2)
    return jnp.pad(stacked, ((0, 0), (0, 0), (0, STATISTIC_ROWS - len(rows)), (0, 0)))


def side_by_side(x: Float[Array, "B S K X"], rows: int) -> Float[Array, "B rows KXp"]:
    """Heads next to each other in whole lanes; rows added up to ``rows`` are zero."""
    batch, length, _, width = x.shape
    added = ((0, 0), (0, rows - length), (0, 0), (0, round_up(width, LANES) - width))
    return jnp.pad(x, added).reshape(batch, rows, -1)


def apart(x: Float[Array, "B rows KXp"], like: Float[Array, "B S K X"]) -> Float[Array, "B S K X"]:
    """Inverse of :func:`side_by_side`, in the shape and dtype of ``like``."""
    batch, length, heads, width = like.shape
    return x.reshape(batch, x.shape[1], heads, -1)[:, :length, :, :width].astype(like.dtype)


# --- Inside the kernels ---


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Full products for float32, the tensor unit's own for bfloat16."""
    if dtype == jnp.float32:
        return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def product(
    left: Float[Array, "i j"], right: Float[Array, "k l"], contract: str
) -> Float[Array, "m n"]:
    """Float32 product of two matrices; ``contract`` names the axis of each that is summed over:
    "nn" = left @ right, "nt" = left @ right.T, "tn" = left.T @ right.
    """
    axes = (0 if contract[0] == "t" else 1, 1 if contract[1] == "t" else 0)
    return jax.lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision_of(left.dtype),
        preferred_element_type=jnp.float32,
    )


def stack_heads(x: Float[Array, "Tq GXp"], group: int) -> Float[Array, "Mp Xp"]:
    """Matrix rows (head, token) of a tile whose heads lie side by side; added rows are zero."""
    tokens, width = x.shape[0], x.shape[1] // group
    parts = [x[:, g * width : (g + 1) * width] for g in range(group)]
    added = round_up(tokens * group, LANES) - tokens * group
    if added:
        parts.append(jnp.zeros((added, width), x.dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def store_heads(ref: Any, x: Float[Array, "Mp Xp"], group: int) -> None:
    """Inverse of :func:`stack_heads`, into ``ref`` [1, Tq, GXp]."""
    tokens, width = ref.shape[1], x.shape[1]
    for g in range(group):
        rows = x[g * tokens : (g + 1) * tokens]
        ref[0, :, g * width : (g + 1) * width] = rows.astype(ref.dtype)


def row_of(statistics: Int[Array, "8 Mp"], at: int) -> Int[Array, "1 Mp"]:
    """One of the rows that :func:`stack_rows` stacked."""
    return statistics[at : at + 1]


def float_row_of(statistics: Int[Array, "8 Mp"], at: int) -> Float[Array, "1 Mp"]:
    """One of the rows that were stacked as the bits of float32 numbers."""
    return jax.lax.bitcast_convert_type(row_of(statistics, at), jnp.float32)


def store_statistics(
    ref: Any,
    lse: Float[Array, "1 Mp"],
    d_lse: Float[Array, "1 Mp"],
    out: Float[Array, "Mp Hvp"],
    d_out: Float[Array, "Mp Hvp"],
    limits: Int[Array, "8 Mp"],
) -> None:
    """Store what the backward kernels need of a tile's rows in ``ref`` [1, 1, 8, Mp]:
    bits of lse (base 2), bits of delta = d_out . out - d_lse, then the first rows of ``limits``.

    Both numbers are 0 for rows that saw nothing, whatever their cotangents are.
    """
    seen = lse > -jnp.inf
    ones = jnp.ones((STATISTIC_ROWS, out.shape[1]), jnp.float32)
    sums = product(ones, d_out.astype(jnp.float32) * out.astype(jnp.float32), "nt")
    delta = jnp.where(seen, sums[:1] - d_lse, 0.0)
    lse = jnp.where(seen, lse * LOG2_E, 0.0)
    for at, row in enumerate((lse, delta)):
        ref[0, 0, at : at + 1] = jax.lax.bitcast_convert_type(row, jnp.int32)
    ref[0, 0, LIMITS:] = limits[: STATISTIC_ROWS - LIMITS]


def start_softmax(top: Any, total: Any, values: Any) -> None:
    """Reset a running softmax: refs of the largest logit and the sum of exponentials [1, Mp] and
    of the weighted values [Hvp, Mp], all float32, logits in base 2.
    """
    top[...] = jnp.full(top.shape, START, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    values[...] = jnp.zeros(values.shape, jnp.float32)


def absorb(
    top: Any,
    total: Any,
    values: Any,
    logits: Float[Array, "S Mp"],
    value: Float[Array, "S Hvp"],
) -> None:
    """Add keys to a running softmax; masked logits are :data:`MASKED`."""
    before = top[...]
    after = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
    weights = jnp.exp2(logits - after)
    decay = jnp.exp2(before - after)
    top[...] = after
    total[...] = total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
    values[...] = values[...] * decay + product(value, weights.astype(value.dtype), "tn")


def finish_softmax(
    top: Any, total: Any, values: Any
) -> tuple[Float[Array, "Mp Hvp"], Float[Array, "1 Mp"]]:
    """Normalised values and lse (natural logarithm); 0 and -inf for rows that saw nothing."""
    sums = total[...]
    seen = sums > 0
    safe = jnp.where(seen, sums, 1.0)
    lse = jnp.where(seen, top[...] * LN_2 + jnp.log(safe), -jnp.inf)
    return jnp.transpose(values[...] / safe), lse


def weights_and_slopes(
    logits: Float[Array, "S Mp"],
    dweights: Float[Array, "S Mp"],
    lse: Float[Array, "1 Mp"],
    delta: Float[Array, "1 Mp"],
) -> tuple[Float[Array, "S Mp"], Float[Array, "S Mp"]]:
    """Weights p and gradients by the logits p * (dp - delta), from masked logits (base 2)."""
    weights = jnp.exp2(logits - lse)
    return weights, weights * (dweights - delta)


def stream(
    steps: Int[Array, ""],
    *,
    copies: Callable[[Any, Any], Sequence[Any]],
    compute: Callable[[Any, Any], None],
    base: Any = 0,
    hand_over: Callable[[Any], None] | None = None,
) -> None:
    """``compute(i, slot)`` for i < steps, each while the copies of the next step run.

    ``copies(i, slot)`` describes the copies of step i into buffer ``slot`` (0 or 1). Step 0 must
    have been started into slot ``base`` (see :func:`start`) if there is a step; ``hand_over(slot)``
    is called when the last step is about to compute (at once if there is none) and may start the
    first step of what comes next into the then free ``slot``, which is (base + steps) % 2.
    """

    def step(i, carry):
        slot = (base + i) % 2

        @pl.when(i + 1 < steps)
        def _():
            start(copies(i + 1, 1 - slot))

        if hand_over is not None:

            @pl.when(i + 1 == steps)
            def _():
                hand_over(1 - slot)

        for copy in copies(i, slot):
            copy.wait()
        compute(i, slot)
        return carry

    if hand_over is not None:

        @pl.when(steps == 0)
        def _():
            hand_over(base)

    jax.lax.fori_loop(0, steps, step, None)


def start(copies: Sequence[Any]) -> None:
    """Start every copy."""
    for copy in copies:
        copy.start()


def clear_unread(visible: Bool[Array, "S Mp"], x: Float[Array, "S X"]) -> Float[Array, "S X"]:
    """Keys or values, zero where no row sees them: what nobody reads may be NaN, and a weight of
    0 does not silence that in a product.
    """
    read = jnp.max(jnp.where(visible, 1.0, 0.0), axis=1, keepdims=True)
    return jnp.where(read > 0, x.astype(jnp.float32), 0.0).astype(x.dtype)


def clear_unseeing(visible: Bool[Array, "S Mp"], x: Float[Array, "Mp X"]) -> Float[Array, "Mp X"]:
    """Queries or cotangents, zero in the rows that see none of the keys: they may be NaN."""
    seeing = jnp.max(jnp.where(visible, 1.0, 0.0), axis=0, keepdims=True)
    seeing = jnp.transpose(jnp.broadcast_to(seeing, (STATISTIC_ROWS, seeing.shape[1])))[:, :1]
    return jnp.where(seeing > 0, x.astype(jnp.float32), 0.0).astype(x.dtype)
