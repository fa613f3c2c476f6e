"""Tile lists and inverse lists against brute force."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse import union_ratio
from kernels_pallas.block_sparse.lists import build_inverse_lists, build_tile_lists

BLOCKS = 7


def selection(seed, queries=19, slots=3):
    rng = np.random.default_rng(seed)
    indices = np.full((2, queries, 2, slots), -1, np.int32)
    for place in np.ndindex(2, queries, 2):
        count = int(rng.integers(0, slots + 1))
        indices[place][:count] = np.sort(rng.choice(BLOCKS, count, replace=False))
    return indices


def selected_by(words, tile):
    """Queries of a tile whose bit is set in ``words`` [W]."""
    return {i for i in range(tile) if (int(words[i // 32]) >> (i % 32)) & 1}


@pytest.mark.parametrize("tile", [1, 4, 19, 40])
def test_tile_lists_hold_the_union_and_who_selected_it(tile):
    indices = selection(0, queries=45 if tile == 40 else 19)
    queries = indices.shape[1]
    lists = build_tile_lists(jnp.asarray(indices), tile=tile, blocks=BLOCKS)
    tiles = -(-queries // tile)
    union = min(tile * 3, BLOCKS)
    assert lists.blocks.shape == (2, 2, tiles, union)
    assert lists.words.shape == (2, 2, tiles, union, -(-tile // 32))
    for b, a, i in np.ndindex(2, 2, tiles):
        wanted = {}
        for token, query in enumerate(range(i * tile, min((i + 1) * tile, queries))):
            for block in indices[b, query, a]:
                if block >= 0:
                    wanted.setdefault(int(block), set()).add(token)
        count = int(lists.count[b, a, i])
        blocks, words = np.asarray(lists.blocks[b, a, i]), np.asarray(lists.words[b, a, i])
        assert blocks[:count].tolist() == sorted(wanted)
        assert np.all(blocks[count:] == -1)
        assert np.all(words[count:] == 0)
        for slot in range(count):
            assert selected_by(words[slot], tile) == wanted[int(blocks[slot])]


@pytest.mark.parametrize("tile", [1, 4])
def test_inverse_lists_hold_the_tiles_of_each_block(tile):
    lists = build_tile_lists(jnp.asarray(selection(1)), tile=tile, blocks=BLOCKS)
    inverse = build_inverse_lists(lists.blocks, lists.words, blocks=BLOCKS)
    plain = build_inverse_lists(lists.blocks, None, blocks=BLOCKS)
    blocks, words = np.asarray(lists.blocks), np.asarray(lists.words)
    assert plain.words is None
    np.testing.assert_array_equal(inverse.offsets, plain.offsets)
    for b, a, block in np.ndindex(2, 2, BLOCKS):
        tiles, slots = np.nonzero(blocks[b, a] == block)
        start, stop = (int(inverse.offsets[b, a, block + i]) for i in (0, 1))
        for either in (inverse, plain):
            assert either.tiles[b, a, start:stop].tolist() == tiles.tolist()
        np.testing.assert_array_equal(inverse.words[b, a, start:stop], words[b, a, tiles, slots])


def test_inverse_lists_ignore_entries_out_of_range():
    blocks = jnp.asarray([[[[-1, 2], [9, 0], [2, -1]]]], jnp.int32)
    inverse = build_inverse_lists(blocks, None, blocks=3)
    assert inverse.offsets[0, 0].tolist() == [0, 1, 1, 3]
    assert inverse.tiles[0, 0, :3].tolist() == [1, 0, 2]


def test_union_ratio():
    same = jnp.broadcast_to(jnp.asarray([0, 3, 5], jnp.int32)[None, None, None, :], (1, 8, 2, 3))
    assert float(union_ratio(same, 4)) == 1.0
    apart = jnp.arange(8, dtype=jnp.int32).reshape(1, 8, 1, 1)
    assert float(union_ratio(apart, 4)) == 4.0
    assert float(union_ratio(jnp.full((1, 8, 2, 3), -1, jnp.int32), 4)) == 0.0
    indices = selection(2)
    sizes, unions = [], []
    for b, a in np.ndindex(2, 2):
        rows = [{int(x) for x in row if x >= 0} for row in indices[b, :, a]]
        sizes += [len(row) for row in rows if row]
        unions += [len(u) for i in range(0, 19, 4) if (u := set().union(*rows[i : i + 4]))]
    expected = np.mean(unions) / np.mean(sizes)
    np.testing.assert_allclose(float(union_ratio(jnp.asarray(indices), 4)), expected, rtol=1e-6)


def test_errors_name_the_values():
    indices = jnp.zeros((1, 4, 1, 1), jnp.int32)
    with pytest.raises(ValueError, match="tile=0"):
        build_tile_lists(indices, tile=0, blocks=4)
    with pytest.raises(ValueError, match="overflows int32"):
        build_tile_lists(indices, tile=2**16, blocks=2**16)
    with pytest.raises(ValueError, match="tile=0"):
        union_ratio(indices, 0)
