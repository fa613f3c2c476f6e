"""Row placement: packed documents, caches, padding."""

import jax.numpy as jnp
import pytest

from sparse_attn.documents import place_rows


def place(ids=None, length=None, alignment=1, positions=None, batch=1, tokens=6):
    return place_rows(
        batch,
        tokens,
        length=length,
        positions=positions,
        segment_ids=None if ids is None else jnp.asarray(ids),
        alignment=alignment,
    )


def test_packed_documents_start_where_their_id_starts():
    rows = place([[1, 1, 2, 2, 2, 0]])
    assert rows.index.tolist() == [[0, 1, 2, 3, 4, -1]]
    assert rows.start.tolist() == [[0, 0, 2, 2, 2, 0]]
    assert rows.positions[0, :5].tolist() == [0, 1, 0, 1, 2]
    assert rows.appended.tolist() == [5]


def test_cached_rows_follow_the_length():
    rows = place([[1, 1, 0], [1, 1, 1]], length=jnp.asarray([4, 0]), batch=2, tokens=3)
    assert rows.index.tolist() == [[4, 5, -1], [0, 1, 2]]
    assert rows.positions[0, :2].tolist() == [4, 5]
    assert rows.appended.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[1, 1, 2, 2, 2, 2]], {"alignment": 4}, "document 2 starts at 2.*alignment=4"),
        ([[1, 2, 2, 1, 1, 1]], {}, "split into several runs"),
        ([[1, 1, 2, 2, 0, 0]], {"length": jnp.asarray([0])}, "one document"),
        ([[0, 0, 1, 1, 1, 1]], {"length": jnp.asarray([0])}, "padded on the right"),
        ([[1, 1]], {}, r"must be \[B, T\]=\(1, 6\)"),
    ],
)
def test_bad_segments_are_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        place(ids, **options)
