"""Block-sparse attention on Hopper: the kernels interpreted against the reference, and lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_proof import strictly_interpreted
from mosaic_gpu_cases import check, draw_heads, expected, functional, interpreted_result

from kernels_pallas import tuned
from kernels_pallas.ahead_of_time import lower_for_gpu
from kernels_pallas.block_sparse import block_sparse_attention, reference
from kernels_pallas.block_sparse.lists import build_inverse_lists
from kernels_pallas.block_sparse.mosaic_gpu import Pieces
from kernels_pallas.block_sparse.mosaic_gpu import block_sparse_attention as on_gpu
from kernels_pallas.block_sparse.mosaic_gpu_sum import sum_pieces
from kernels_pallas.gpu_tiles import Layout, Tiles

ON_GPU = jax.default_backend() == "gpu"


def draw_lists(rng, shape, blocks, hot=False):
    """Ascending lists of distinct blocks, some empty; ``hot`` puts block 0 in all others."""
    indices = np.full(shape, -1, np.int32)
    for place in np.ndindex(*shape[:3]):
        count = int(rng.integers(0, min(shape[3], blocks) + 1))
        indices[place][:count] = np.sort(rng.choice(blocks, count, replace=False))
        if hot and count:
            indices[place][0] = 0
    return jnp.asarray(indices)


def bind(attend, shape, block_size, causal, **options):
    scale = options.pop("scale", shape[5] ** -0.5)

    def run(q, k, v, indices, positions):
        return attend(
            q,
            k,
            v,
            indices,
            block_size=block_size,
            positions=positions,
            causal=causal,
            scale=scale,
            **options,
        )

    return run


def draw(seed, shape, lists, slots, block_size, hot=False):
    rng = np.random.default_rng(seed)
    batch, rows, keys = shape[:3]
    arrays = draw_heads(rng, shape)
    indices = draw_lists(rng, (batch, rows, lists, slots), -(-keys // block_size), hot)
    positions = jnp.asarray(rng.integers(-1, keys, (batch, rows)), jnp.int32)
    return arrays, indices, positions


def unseen_keys(shape, indices, positions, block_size, causal):
    """bool [B, S, K]: keys that no query sees, many of them in blocks that some query visits."""
    batch, rows, keys, _, kv_heads = shape[:5]
    lists = indices.shape[2]
    unseen = np.ones((batch, keys, kv_heads), bool)
    for b, t, j in np.ndindex(batch, rows, max(lists, kv_heads)):
        last = int(positions[b, t]) if causal else keys - 1
        for block in np.asarray(indices[b, t, j % lists]):
            if block >= 0:
                stop = min((block + 1) * block_size, last + 1)
                unseen[b, block * block_size : stop, j * kv_heads // max(lists, kv_heads)] = False
    return unseen


def poison(q, k, v, indices, positions, block_size, causal):
    """NaN and infinity in queries without a position and in keys that no query sees."""
    shape = (*q.shape[:2], k.shape[1], *q.shape[2:3], k.shape[2])
    unseen = unseen_keys(shape, indices, positions, block_size, causal)[..., None]
    if causal:
        q = jnp.where((positions >= 0)[:, :, None, None], q, jnp.nan)
    return q, jnp.where(unseen, jnp.nan, k), jnp.where(unseen, jnp.inf, v)


def compare(
    seed, shape, lists, slots, *, block_size=64, causal=True, hot=False, twice=False, **options
):
    (q, k, v), indices, positions = draw(seed, shape, lists, slots, block_size, hot)
    specification = bind(
        reference.block_sparse_attention, shape, block_size, causal, **options_of(options)
    )
    want = expected(specification, q, k, v, indices, positions)
    attend = bind(on_gpu, shape, block_size, causal, **options)
    poisoned = poison(q, k, v, indices, positions, block_size, causal)
    check(interpreted_result(attend, *poisoned, indices, positions, twice=twice), want)


def options_of(options):
    return {name: value for name, value in options.items() if name == "scale"}


def test_interpreted_equals_reference_odd_sizes_poisoned_repeatable():
    compare(0, (2, 47, 201, 3, 1, 96, 64), 1, 2, twice=True)


def test_sums_of_pieces_in_order():
    """A hot block of many pieces beside blocks without any; two lists share the kv head."""
    rng = np.random.default_rng(0)
    layout = Layout(batch=1, tokens=1, query_heads=2, kv_heads=1, group=1, warpgroups=1)
    offset = np.asarray([[0, 5, 5, 6], [0, 0, 3, 3]], np.int32)
    parts = rng.normal(size=(2, 8, 64, 64)).astype(np.float32)
    for entry, unused in ((0, 6), (1, 3)):
        parts[entry, unused:] = np.nan
    with strictly_interpreted("gpu"):
        total = sum_pieces(
            jnp.asarray(parts), jnp.asarray(offset), layout, runs=1, dtype=jnp.bfloat16
        )
        total = np.asarray(total, np.float32)
    runs = parts[0, :5].sum(0), parts[1, :3].sum(0), parts[0, 5]
    want = np.concatenate(runs).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(total[0, :, 0], want, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("union", [1, 5])
def test_pieces_cover_every_list_once(union):
    """Pieces are at most the mean list long and join to the inverse lists, in order."""
    rng = np.random.default_rng(1)
    tiles, blocks = 40, 7
    visits = np.full((1, 2, tiles, union), -1, np.int32)
    for place in np.ndindex(1, 2, tiles):
        visits[place] = np.sort(rng.choice(blocks, union, replace=False))
        visits[place][0] = 0  # may repeat: only the numbers matter here
    words = np.ones((*visits.shape, 1), np.int32)
    inverse = build_inverse_lists(jnp.asarray(visits), jnp.asarray(words), blocks=blocks)
    pieces = Pieces.of(inverse, 64)
    offsets = np.asarray(inverse.offsets).reshape(2, blocks + 1)
    most = -(-tiles * union // blocks)
    for entry in range(2):
        for block in range(blocks):
            covered = []
            for w in range(int(pieces.offset[entry, block]), int(pieces.offset[entry, block + 1])):
                assert pieces.block[entry, w] == block
                assert 0 < pieces.size[entry, w] <= most
                first = int(pieces.first[entry, w])
                covered += range(first, first + int(pieces.size[entry, w]))
            assert covered == list(range(offsets[entry, block], offsets[entry, block + 1]))
        unused = np.asarray(pieces.size)[entry, int(pieces.offset[entry, -1]) :]
        assert not unused.any()


@pytest.mark.full
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("lists", ["one", "kv head", "query head"])
def test_interpreted_equals_reference_groups(group, lists):
    count = {"one": 1, "kv head": 2, "query head": 2 * group}[lists]
    if count > 8:
        pytest.skip("the same as a group of one with more heads")
    compare(group, (2, 43, 131, 2 * group, 2, 64, 64), count, 2)


@pytest.mark.full
@pytest.mark.parametrize("widths", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_interpreted_equals_reference_widths(widths):
    compare(3, (1, 70, 200, 4, 2, *widths), 2, 3)


@pytest.mark.full
@pytest.mark.parametrize("block_size", [64, 128, 192])
def test_interpreted_equals_reference_block_sizes(block_size):
    compare(4, (1, 50, 500, 2, 1, 64, 64), 1, 2, block_size=block_size)


@pytest.mark.full
@pytest.mark.parametrize("options", [{"scale": -0.3}, {"scale": 0.0}, {"causal": False}])
def test_interpreted_equals_reference_options(options):
    compare(5, (1, 70, 130, 2, 1, 64, 64), 1, 2, **options)


@pytest.mark.full
@pytest.mark.parametrize("tiles", [Tiles(1, 64, 1, 1, 1), Tiles(2, 64, 3, 2, 3)])
def test_interpreted_equals_reference_tiles_and_a_hot_block(tiles):
    compare(6, (1, 280, 400, 2, 2, 64, 64), 2, 2, tiles=tiles, hot=True, twice=True)


def test_interpreted_unseen_keys_of_visited_blocks_may_be_nan():
    """One query lists blocks 0 and 2 and stops inside 2; another, that lists none, reaches on."""
    compare(2, (1, 2, 200, 1, 1, 64, 64), 1, 2)


@pytest.mark.full
@pytest.mark.parametrize("backward", [1, 2])
def test_interpreted_equals_reference_other_rows_a_tile_backward(backward):
    """Measured tiles may differ by pass: the lists are then built again."""
    sizes = {"group": 2, "block_size": 64, "width": 64, "value_width": 64, "dtype": "bfloat16"}
    warpgroups = {"forward": 3 - backward, "backward": backward}
    entries = [
        tuned.Entry("block_sparse_attention", direction, 1, sizes, {"warpgroups": count})
        for direction, count in warpgroups.items()
    ]
    with tuned.using(entries):
        compare(11, (1, 150, 201, 4, 2, 64, 64), 2, 2)


@pytest.mark.full
def test_interpreted_equals_reference_group_larger_than_a_tile():
    compare(7, (1, 3, 130, 192, 1, 64, 64), 1, 2)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_interpreted_equals_reference_random_shapes(seed):
    rng = np.random.default_rng(1000 + seed)
    kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 6))
    width = int(rng.choice([32, 64, 80, 128]))
    shape = (int(rng.integers(1, 3)), int(rng.integers(1, 90)), int(rng.integers(1, 300)))
    shape = (*shape, kv_heads * group, kv_heads, width, int(rng.choice([width, 64])))
    lists = int(rng.choice([1, kv_heads, kv_heads * group]))
    compare(
        seed,
        shape,
        lists,
        int(rng.integers(1, 5)),
        block_size=int(rng.choice([64, 128])),
        causal=bool(rng.integers(0, 2)),
    )
    jax.clear_caches()


def shapes_of(rows, query_heads, kv_heads, width, value_width, slots=16):
    return (
        jax.ShapeDtypeStruct((1, rows, query_heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, rows, kv_heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, rows, kv_heads, value_width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, rows, kv_heads, slots), jnp.int32),
        jax.ShapeDtypeStruct((1, rows), jnp.int32),
    )


def forward_and_backward(block_size):
    def run(q, k, v, indices, positions):
        def loss(*arrays):
            out, lse = on_gpu(
                *arrays,
                indices,
                block_size=block_size,
                positions=positions,
                causal=True,
                scale=0.1,
            )
            return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse), (out, lse)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    return run


@pytest.mark.parametrize(
    ("case", "block_size"),
    [
        ((32768, 32, 4, 128, 128), 64),
        pytest.param((131072, 32, 4, 128, 128), 64, marks=pytest.mark.full),
        pytest.param((131072, 64, 4, 128, 128, 96), 64, marks=pytest.mark.full),
        pytest.param((32768, 64, 4, 64, 64), 128, marks=pytest.mark.full),
        pytest.param((32768, 8, 8, 96, 96), 64, marks=pytest.mark.full),
        pytest.param((32768, 16, 1, 192, 128), 64, marks=pytest.mark.full),
        ((32768, 16, 4, 256, 256), 64),
    ],
)
def test_lowers_for_hopper(case, block_size):
    module = lower_for_gpu(forward_and_backward(block_size), *shapes_of(*case))
    assert module.count("mosaic_gpu") >= 5


@pytest.mark.parametrize(
    ("dtype", "width", "block_size", "message"),
    [
        (jnp.float32, 64, 64, "bfloat16 or float16"),
        (jnp.bfloat16, 320, 64, "width 320 is above 256"),
        (jnp.bfloat16, 64, 48, "block_size=48 is not a multiple of 64"),
    ],
)
def test_refusals_name_the_values(dtype, width, block_size, message):
    arrays = draw_heads(np.random.default_rng(0), (1, 8, 8, 1, 1, width, width), dtype)
    indices = jnp.zeros((1, 8, 1, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        block_sparse_attention(*arrays, indices, block_size=block_size, implementation="mosaic_gpu")


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("shape", "lists", "slots", "block_size"),
    [
        ((2, 47, 201, 3, 1, 96, 64), 1, 2, 64),
        ((2, 700, 1100, 16, 2, 64, 64), 2, 6, 64),
        ((1, 2048, 2048, 64, 4, 128, 128), 4, 16, 64),
        ((1, 1000, 1500, 8, 8, 192, 128), 8, 5, 128),
        ((1, 1024, 2048, 8, 2, 256, 256), 8, 8, 64),
    ],
)
@pytest.mark.parametrize("hot", [False, True])
def test_device_equals_reference(shape, lists, slots, block_size, hot):
    (q, k, v), indices, positions = draw(11, shape, lists, slots, block_size, hot)
    specification = bind(reference.block_sparse_attention, shape, block_size, True)
    want = expected(specification, q, k, v, indices, positions)
    run = functional(bind(on_gpu, shape, block_size, True))
    poisoned = poison(q, k, v, indices, positions, block_size, True)
    result, again = (jax.tree.map(np.asarray, run(*poisoned, indices, positions)) for _ in range(2))
    check(result, want)
    for name, array in result.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.device
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
def test_device_equals_xla_at_length():
    """32k tokens, 16 blocks of 64 with block 0 in every list."""
    rows, slots = 32768, 16
    shape = (1, rows, rows, 16, 4, 128, 128)
    rng = np.random.default_rng(12)
    q, k, v = draw_heads(rng, shape)
    positions = jnp.arange(rows, dtype=jnp.int32)[None, :]
    # Neighbours agree: a list for every 16 tokens, block 0 and the newest block among them.
    own = np.arange(rows)[::16] // 64
    picks = rng.integers(0, own[:, None, None] + 1, (own.size, 4, slots))
    picks[:, :, 0], picks[:, :, 1] = 0, own[:, None]
    picks = np.sort(picks, axis=2)
    repeated = np.concatenate([np.zeros_like(picks[..., :1], bool), np.diff(picks) == 0], axis=2)
    picks = np.sort(np.where(repeated, rows, picks), axis=2)
    picks = np.where(picks == rows, -1, picks)
    indices = jnp.asarray(np.repeat(picks, 16, axis=0)[None], jnp.int32)
    attend = bind(
        lambda *a, scale, **o: block_sparse_attention(*a, scale=scale, implementation="xla", **o),
        shape,
        64,
        True,
    )
    want = expected(attend, q, k, v, indices, positions)
    result = functional(bind(on_gpu, shape, 64, True))(q, k, v, indices, positions)
    check(jax.tree.map(np.asarray, result), want)
