"""Block scores on TPUs: the kernels lowered and compiled ahead of time, and their memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.ahead_of_time import TPU_CHIPS, compile_for_tpu, lower_for_tpu
from kernels_pallas.block_scores import Pooling
from kernels_pallas.block_scores.mosaic_tpu import (
    block_scores as block_scores_tpu,
)
from kernels_pallas.block_scores.mosaic_tpu import (
    entry_lse as entry_lse_tpu,
)
from kernels_pallas.block_scores.mosaic_tpu import (
    select_blocks as select_blocks_tpu,
)

NSA = Pooling.geometric(32, 16, 64)
FIVE = Pooling((1.0,) * 5, -1, 4, "max")  # InfLLM-V2
RULES = {"initial": 1, "recent": 2, "scale": 0.2}


def structures(length, dtype=jnp.bfloat16, heads=32, kv_heads=4, width=128, value_width=128):
    """Shapes of q, k, v and the four row arrays of a sequence with 16 tokens an entry."""

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    entries = -(-length // 16)
    q, k = of(length, heads, width), of(entries, kv_heads, width)
    return q, k, of(entries, kv_heads, value_width), *[of(length, dtype=jnp.int32)] * 4


def forward(*operands):
    return block_scores_tpu(*operands, pooling=NSA, selected=16, **RULES)


def backward(q, k, v, *rows):
    def loss(q, k, v):
        result = forward(q, k, v, *rows)
        return jnp.sum(result.out.astype(jnp.float32)) + jnp.sum(result.lse), result.indices

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def choose(q, k, v, *rows, **options):
    """InfLLM-V2's choice: 96 blocks of its own normaliser; ``v`` is not read."""
    options = {"lse": None, "budget": None, "floor": None, "share": True, **options}
    return select_blocks_tpu(q, k, *rows, pooling=FIVE, selected=96, **RULES, **options)


def normalize(q, k, v, *rows):
    return entry_lse_tpu(q, k, *rows[:2], scale=0.1)


def temporary_bound(function, shapes, slots):
    """Bytes of copies a call may make, linear in T: never [T, C].

    Heads lie side by side in the kernels, so each array of queries' size is copied once in padded
    lanes (forward q and out; backward also q, out, d_out and dq); keys and values at most three
    times; lists, which leave transposed, twice; lse, delta and their tiles twelve times in float32;
    and 512 bytes of scalars for each of three kernels and tile of 16 tokens or more.
    """
    q, k, v, *_ = shapes
    widths = [-(-x.shape[3] // 128) * 128 for x in (q, v)]
    rows = q.shape[0] * q.shape[1]
    copies = {forward: (1, 1), backward: (3, 3), choose: (1, 0), normalize: (1, 0)}[function]
    queries = rows * q.shape[2] * q.dtype.itemsize
    queries *= copies[0] * widths[0] + copies[1] * widths[1]
    keys = 3 * k.shape[1] * k.shape[2] * (sum(widths)) * 4
    lists = 2 * rows * k.shape[2] * slots * 4
    return queries + keys + lists + 12 * rows * q.shape[2] * 4 + 3 * 512 * -(-rows // 16) + 2**20


def compile_within_bound(function, shapes, slots, chip):
    compiled = compile_for_tpu(function, *shapes, chip=chip)
    used = compiled.memory_analysis().temp_size_in_bytes
    bound = temporary_bound(function, shapes, slots)
    assert used <= bound, f"{used} bytes of temporary memory, more than {bound}"
    pairs = shapes[0].shape[1] * shapes[1].shape[1]  # [T, C] for every query head
    return used, bound, 4 * pairs * shapes[0].shape[2]


def test_lowers_for_tpu():
    text = lower_for_tpu(backward, *structures(200, heads=4, kv_heads=2), chip="v5e")
    for name in ("select_blocks", "ranged_attention"):
        assert name in text


@pytest.mark.parametrize("chip", sorted(TPU_CHIPS))
def test_compiles_within_bounds(chip):
    shapes = structures(32768)
    used, _, dense = compile_within_bound(forward, shapes, 16, chip)
    assert used < dense / 10


@pytest.mark.full
@pytest.mark.parametrize("chip", sorted(TPU_CHIPS))
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_lowers_for_every_chip_and_width(chip, widths):
    for dtype in (jnp.bfloat16, jnp.float32):
        shapes = structures(1000, dtype, 8, 2, *widths)
        for function in (backward, choose, normalize):
            lower_for_tpu(function, *shapes, chip=chip)


@pytest.mark.full
@pytest.mark.parametrize("chip", sorted(TPU_CHIPS))
@pytest.mark.parametrize("length", [32768, 131072])
@pytest.mark.parametrize("function", [forward, backward, choose, normalize])
def test_compiles_at_real_shapes(function, length, chip):
    slots = 96 if function is choose else 16
    used, bound, dense = compile_within_bound(function, structures(length), slots, chip)
    print(f"{function.__name__} {length} {chip}: {used / 2**20:.0f} <= {bound / 2**20:.0f} MiB")
    assert bound < dense / 4


@pytest.mark.full
@pytest.mark.parametrize("chip", sorted(TPU_CHIPS))
def test_compiles_other_shapes(chip):
    for dtype, width in ((jnp.float32, 128), (jnp.bfloat16, 64), (jnp.bfloat16, 256)):
        shapes = structures(32768, dtype, 16, 4, width, width)
        compile_within_bound(backward, shapes, 16, chip)
        compile_within_bound(choose, shapes, 96, chip)
    compile_for_tpu(functools.partial(choose, share=False), *structures(32768), chip=chip)
    compile_for_tpu(choose, *structures(1001, heads=3, kv_heads=3), chip=chip)
