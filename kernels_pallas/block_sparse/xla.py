"""Block-sparse attention in plain XLA: the choice of an execution, and the custom VJP they share.

Three executions give the same result:

* ``dense``: short key sequences; all keys, the selection as a mask (:mod:`.xla_dense`).
* ``key_major``: CPUs; every key block meets exactly the queries that selected it, through the
  inverse lists (:mod:`.xla_key_major`).
* ``query_major``: everything else; tiles of queries visit the union of their blocks, dk and dv
  through the inverse lists of the tiles (:mod:`.xla_query_major`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse import xla_dense, xla_key_major, xla_query_major
from kernels_pallas.common import AttentionOutput, accumulation_dtype

__all__ = ["Execution", "Tuning", "block_sparse_attention", "choose_execution"]

Execution = Literal["dense", "key_major", "query_major"]

_logger = logging.getLogger("sparse_attn")
_logged: set[tuple[int, int, int, str]] = set()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes of the executions and the limits between them; none changes a result.

    The defaults were measured on one AVX-512 core, float32, H = 64.

    Attributes:
      execution: the execution to use, or None to choose by :func:`choose_execution`.
      rows_per_step: key-major, rows (queries times G) that meet a key block in one step.
      tile: query-major, consecutive queries that share a union.
      blocks_per_step: query-major, blocks (or, for dk and dv, tiles) visited in one step.
      tiles_at_once: query-major, tiles advanced together.
      dense_elements: dense, logits of a chunk of queries at most.
      dense_keys: key sequences up to this length run dense. On a CPU the list walk wins already
        above 256 keys, even where every block is selected: it skips what is not causal.
      smallest_block: blocks below this many keys do not run key-major.
    """

    execution: Execution | None = None
    rows_per_step: int = 512
    tile: int = 16
    blocks_per_step: int = 8
    tiles_at_once: int = 1
    dense_elements: int = 2**20
    dense_keys: int = 256
    smallest_block: int = 16


_CPU = Tuning()
# Not measured: guesses for an accelerator without a kernel of its own.
_PARALLEL = Tuning(tiles_at_once=64, dense_elements=2**24, dense_keys=2048)


def choose_execution(keys: int, block_size: int, platform: str, tuning: Tuning) -> Execution:
    """The execution for S = ``keys``: a static rule from measured break-evens.

    The number of selected blocks does not enter: masked dense execution scores every key, the
    key-major walk never more than the causal ones.
    """
    if tuning.execution is not None:
        return tuning.execution
    if keys <= tuning.dense_keys:
        return "dense"
    if platform == "cpu" and block_size >= tuning.smallest_block:
        return "key_major"
    return "query_major"


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    indices: Int[Array, "B T J P"],
    *,
    block_size: int,
    positions: Int[Array, "B T"],
    causal: bool,
    scale: float,
    tuning: Tuning | None = None,
) -> AttentionOutput:
    """Arguments and results as in the api; ``tuning`` defaults to the platform's."""
    platform = jax.default_backend()
    if tuning is None:
        tuning = _CPU if platform == "cpu" else _PARALLEL
    keys, slots = k.shape[1], indices.shape[3]
    execution = choose_execution(keys, block_size, platform, tuning)
    if (keys, slots, block_size, execution) not in _logged:
        _logged.add((keys, slots, block_size, execution))
        _logger.info(
            "block_sparse_attention over S=%d with %d blocks of %d runs %s",
            keys,
            slots,
            block_size,
            execution,
        )
    last = jnp.full(q.shape[:2], keys - 1, jnp.int32)
    if causal:
        last = jnp.minimum(positions.astype(jnp.int32), last)
    indices = indices.astype(jnp.int32)
    if indices.shape[2] == 1:
        indices = jnp.broadcast_to(indices, (*indices.shape[:2], k.shape[2], indices.shape[3]))
    # Blocks that start after the query's last key are visited by nobody.
    in_reach = indices <= (last // block_size)[:, :, None, None]
    indices = jnp.where(in_reach & (last >= 0)[:, :, None, None], indices, -1)
    tuning = dataclasses.replace(tuning, execution=execution)
    return AttentionOutput(*_attend(block_size, scale, tuning, q, k, v, indices, last))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(block_size, scale, tuning, q, k, v, indices, last):
    return _attend_forward(block_size, scale, tuning, q, k, v, indices, last)[0]


def _sizes(tuning: Tuning) -> dict[str, int]:
    """The tuning constants that the chosen execution takes."""
    if tuning.execution == "dense":
        return {"elements": tuning.dense_elements}
    if tuning.execution == "key_major":
        return {"rows_per_step": tuning.rows_per_step}
    return {
        "tile": tuning.tile,
        "blocks_per_step": tuning.blocks_per_step,
        "tiles_at_once": tuning.tiles_at_once,
    }


def _attend_forward(block_size, scale, tuning, q, k, v, indices, last):
    options = {"block_size": block_size, "scale": scale, **_sizes(tuning)}
    if tuning.execution == "dense":
        output, lists = xla_dense.forward(q, k, v, indices, last, **options), indices
    elif tuning.execution == "key_major":
        output, lists = xla_key_major.forward(q, k, v, indices, last, **options)
    else:
        output, lists = xla_query_major.forward(q, k, v, indices, last, **options)
    return output, (q, k, v, lists, last, output)


def _attend_backward(block_size, scale, tuning, residuals, cotangent):
    q, k, v, lists, last, output = residuals
    dtype = accumulation_dtype(q.dtype)
    # dlse enters every logit's gradient as p * dlse, hence beside delta.
    seen = ~jnp.isneginf(output.lse)
    products = cotangent.out.astype(dtype) * output.out.astype(dtype)
    delta = jnp.where(seen, jnp.sum(products, axis=-1) - cotangent.lse, 0.0)
    modules = {"dense": xla_dense, "key_major": xla_key_major, "query_major": xla_query_major}
    dq, dk, dv = modules[tuning.execution].backward(
        q,
        k,
        v,
        lists,
        last,
        output.lse,
        delta,
        cotangent.out,
        block_size=block_size,
        scale=scale,
        **_sizes(tuning),
    )
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
