"""Packing: documents into rows of one length, planned from the documents' lengths alone.

A document is a run of tokens ``x_0 .. x_n``; its inputs are ``x_0 .. x_{n-1}`` and its targets
``x_1 .. x_n``. Documents longer than a row are cut into pieces; each piece is a segment of its
own, and the target of its last input is the document's next token, so every input is scored once
an epoch. Segments start at multiples of ``alignment`` (the mechanism's block size), the gaps are
padding with segment id 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """How full the rows of a plan are: ``efficiency`` = input tokens / (rows * sequence length)."""

    rows: int
    segments: int
    tokens: int
    efficiency: float


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Which piece of which document lies where.

    Segment ``i`` holds the inputs ``[start_i, start_i + length_i)`` of ``document_i`` in row
    ``row_i`` from ``offset_i`` on. Segments are sorted by (row, offset); ``row_bounds`` [rows + 1]
    are the segments of each row.
    """

    sequence_length: int
    alignment: int
    document: Int[np.ndarray, "segments"]
    start: Int[np.ndarray, "segments"]
    length: Int[np.ndarray, "segments"]
    offset: Int[np.ndarray, "segments"]
    row_bounds: Int[np.ndarray, "rows_and_one"]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_bounds) - 1

    def report(self) -> PackingReport:
        """Rows, segments, tokens and the share of the rows that is not padding."""
        tokens = int(self.length.sum())
        places = self.rows * self.sequence_length
        return PackingReport(self.rows, len(self.length), tokens, tokens / max(places, 1))


def cut_documents(
    lengths: Int[np.ndarray, "documents"],
    sequence_length: int,
    alignment: int,
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut inputs into pieces of at most ``sequence_length``.

    A document that fits stays whole. With ``rng`` the first piece of a longer one has a random
    length (a multiple of ``alignment``), so that the cuts fall elsewhere each time.

    Returns:
      ``document``, ``start`` and ``length`` of every piece, int64, in document order.
    """
    lengths = np.asarray(lengths, np.int64)
    first = np.full(lengths.shape, sequence_length, np.int64)
    if rng is not None:
        random = alignment * rng.integers(1, sequence_length // alignment + 1, lengths.shape)
        first = np.where(lengths > sequence_length, random, first)
    # Pieces: the first one, then as many full ones as needed.
    counts = np.where(
        lengths > first, 1 + -(-(lengths - first) // sequence_length), (lengths > 0).astype(int)
    )
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.where(number == 0, 0, first[document] + (number - 1) * sequence_length)
    stop = np.minimum(first[document] + number * sequence_length, lengths[document])
    return document, start, stop - start


def cut_into_bins(
    lengths: Int[np.ndarray, "documents"], bins: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut inputs into pieces so that every bin of piece lengths gets about as many tokens.

    Bin i holds the lengths (bins[i-1], bins[i]]. Document by document, in a random order, the next
    piece comes from the bin with the fewest tokens among those that the rest of the document can
    fill, with a length drawn evenly from it; a rest shorter than that is a piece of its own.

    Returns:
      ``document``, ``start`` and ``length`` of every piece, int64, in document order.
    """
    edges = np.array([0, *bins], np.int64)
    filled = np.zeros(len(bins), np.int64)
    pieces: list[tuple[int, int, int]] = []
    for document in rng.permutation(len(lengths)).tolist():
        start, end = 0, int(lengths[document])
        while start < end:
            possible = max(int(np.searchsorted(edges[:-1], end - start, side="left")), 1)
            chosen = int(np.argmin(filled[:possible]))
            length = int(rng.integers(edges[chosen] + 1, edges[chosen + 1] + 1))
            length = min(length, end - start)
            filled[int(np.searchsorted(edges[1:], length, side="left"))] += length
            pieces.append((document, start, length))
            start += length
    document, start, length = np.array(sorted(pieces), np.int64).T
    return document, start, length


def plan_packing(
    lengths: Int[np.ndarray, "documents"],
    sequence_length: int,
    alignment: int = 1,
    seed: int = 0,
    epoch: int = 0,
    length_bins: tuple[int, ...] = (),
) -> PackingPlan:
    """Place every input of every document once, best fit first, in a seeded order.

    Pieces are taken from the longest to the shortest, each into the fullest row that still holds
    it. ``seed`` and ``epoch`` decide between equal lengths, the order of segments in a row and the
    order of rows; from epoch 1 on also where long documents are cut. Equal arguments give equal
    plans on every machine.

    Args:
      lengths: input tokens of each document (one less than its tokens).
      sequence_length: tokens in a row, a multiple of ``alignment``.
      alignment: segments start at multiples of it.
      seed: any integer >= 0.
      epoch: any integer >= 0.
      length_bins: ascending upper edges of piece lengths that share the tokens evenly
        (:func:`cut_into_bins`); none: documents are cut only where they exceed a row.

    Raises:
      ValueError: if a length is negative, there is nothing to place, or ``sequence_length`` is not
        a multiple of ``alignment``.
    """
    lengths = np.asarray(lengths, np.int64)
    if alignment < 1 or sequence_length < 1 or sequence_length % alignment:
        raise ValueError(
            f"sequence_length={sequence_length} is not a positive multiple of "
            f"alignment={alignment}; segments start at multiples of the attention block"
        )
    if length_bins and length_bins[-1] > sequence_length:
        raise ValueError(f"{length_bins=} ends above {sequence_length=}, the length of a row")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError(f"document lengths must be a list of numbers >= 0, got {lengths}")
    if not lengths.sum():
        raise ValueError(f"{len(lengths)} documents hold no input token; nothing to pack")
    rng = np.random.default_rng([seed, epoch])
    if length_bins:
        document, start, length = cut_into_bins(lengths, length_bins, rng)
    else:
        document, start, length = cut_documents(
            lengths, sequence_length, alignment, rng if epoch else None
        )
    shuffled = rng.permutation(len(length))
    order = shuffled[np.argsort(-length[shuffled], kind="stable")]
    row = np.empty(len(length), np.int64)
    row[order] = _best_fit(-(-length[order] // alignment), sequence_length // alignment)
    rows = int(row.max()) + 1
    row = rng.permutation(rows)[row]
    order = shuffled[np.argsort(row[shuffled], kind="stable")]
    row, document, start, length = row[order], document[order], start[order], length[order]
    row_bounds = np.searchsorted(row, np.arange(rows + 1))
    taken = -(-length // alignment) * alignment
    before = np.cumsum(taken) - taken
    offset = before - before[row_bounds[row]]
    return PackingPlan(sequence_length, alignment, document, start, length, offset, row_bounds)


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each item: the fullest row with room for it (the newest of equals), else a new row."""
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    nonempty = 0  # bit c is set while some row has exactly c places left
    result = np.empty(len(sizes), np.int64)
    rows = 0
    for item, size in enumerate(sizes.tolist()):
        fitting = nonempty >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                nonempty ^= 1 << room
        else:
            room, row = capacity, rows
            rows += 1
        result[item] = row
        if room > size:
            rows_with_room[room - size].append(row)
            nonempty |= 1 << (room - size)
    return result


def build_row(
    plan: PackingPlan,
    index: int,
    tokens: Int[np.ndarray, "total"],
    bounds: Int[np.ndarray, "documents_and_one"],
    pad_id: int,
) -> Row:
    """Row ``index`` of a plan.

    Args:
      plan: made from ``np.diff(bounds) - 1``.
      index: which row.
      tokens: all documents one after the other.
      bounds: document ``d`` is ``tokens[bounds[d]:bounds[d + 1]]``.
      pad_id: token of padding.

    Returns:
      Arrays [sequence_length]: ``tokens``, ``targets`` (the document's next token), ``segment_ids``
      (1, 2, ... along the row, 0 = padding), ``positions`` (inside the segment), all int32, and
      ``weights`` float32 (1 where the target counts, 0 on padding).
    """
    shape = plan.sequence_length
    row = {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    first, last = plan.row_bounds[index], plan.row_bounds[index + 1]
    for number, segment in enumerate(range(first, last), start=1):
        length = plan.length[segment]
        begin = bounds[plan.document[segment]] + plan.start[segment]
        place = slice(plan.offset[segment], plan.offset[segment] + length)
        row["tokens"][place] = tokens[begin : begin + length]
        row["targets"][place] = tokens[begin + 1 : begin + length + 1]
        row["weights"][place] = 1
        row["segment_ids"][place] = number
        row["positions"][place] = np.arange(length)
    return row


REPEAT_LENGTHS = (4, 33)
"""Lengths of the spans that :func:`repeat_spans` copies, the last one excluded."""


@dataclasses.dataclass(frozen=True)
class Alphabets:
    """What :func:`repeat_spans` may draw from: all token ids [low, high), and those of digits."""

    low: int
    high: int
    digits: tuple[int, ...]


def repeat_spans(row: Row, share: float, alphabets: Alphabets, rng: np.random.Generator) -> Row:
    """``row`` in which about ``share`` of each document, its first quarter aside, comes again.

    Attention that finds what was said before is rare in prose and decides whether a model finds a
    needle. Three of five spans are copies of earlier text; one in five are random tokens and one
    in five digits, which are written into the earlier text as well, at a random place. Targets
    follow the new tokens.
    """
    tokens, targets = row["tokens"].copy(), row["targets"].copy()
    ids = row["segment_ids"]
    least, most = REPEAT_LENGTHS
    for number in range(1, int(ids.max(initial=0)) + 1):
        place = np.flatnonzero(ids == number)
        text = tokens[place]
        at = max(len(text) // 4, 2 * most)
        while at + most <= len(text):
            length = int(rng.integers(least, most))
            source = int(rng.integers(1, at - length + 1))
            kind = rng.integers(5)
            if kind == 3:
                text[source : source + length] = rng.integers(alphabets.low, alphabets.high, length)
            elif kind == 4:
                text[source : source + length] = rng.choice(alphabets.digits, length)
            text[at : at + length] = text[source : source + length]
            at += length + int(rng.exponential(length * (1 - share) / share)) + 1
        tokens[place], targets[place[:-1]] = text, text[1:]
    return {**row, "tokens": tokens, "targets": targets}


SPREAD_PARTS = 4
"""Parts of a document between which :func:`spread_positions` leaves gaps."""


def spread_positions(row: Row, limit: int, rng: np.random.Generator) -> Row:
    """``row`` whose rotary positions jump: each document in parts of a text of up to ``limit``.

    Positional skips (PoSE, arXiv 2309.10400): a document is cut into ``SPREAD_PARTS`` parts at
    random places, and positions that are left out are dealt to the gaps, and to the place before
    the first part, at random. Documents as long as ``limit`` stay as they are.
    """
    positions = row["positions"].copy()
    ids = row["segment_ids"]
    for number in range(1, int(ids.max(initial=0)) + 1):
        place = np.flatnonzero(ids == number)
        spare = max(limit - len(place), 0)
        cuts = np.sort(rng.integers(0, len(place), SPREAD_PARTS - 1))
        # One share more than there are parts stays unused behind the last of them.
        gaps = rng.dirichlet(np.ones(SPREAD_PARTS + 1))[:SPREAD_PARTS] * spare
        for cut, gap in zip((0, *cuts), gaps, strict=True):
            positions[place[cut:]] += int(gap)
    return {**row, "positions": positions}


def check_segments(segment_ids: Int[np.ndarray, "B T"], alignment: int) -> None:
    """Hold rows to the packing contract, on the host.

    Along every row the non-zero ids must be 1, 2, 3, ..., each one run without a gap inside, that
    starts at a multiple of ``alignment``; 0 is padding.

    Raises:
      ValueError: naming the first row that breaks it, with its ids and offsets.
    """
    ids = np.asarray(segment_ids)
    if ids.ndim != 2:
        raise ValueError(f"segment_ids has shape {ids.shape}, expected [B, T]")
    before = np.concatenate([np.zeros_like(ids[:, :1]), ids[:, :-1]], axis=1)
    rows, starts = np.nonzero((ids != before) & (ids != 0))
    found = ids[rows, starts]
    # The number of runs begun so far in the row is the id each run must carry.
    first_of_row = np.searchsorted(rows, rows)
    expected = np.arange(len(rows)) - first_of_row + 1
    for wrong, problem in (
        (found != expected, "do not number contiguous segments 1, 2, 3, ..."),
        (starts % alignment != 0, f"start at offsets that are not multiples of {alignment}"),
    ):
        if wrong.any():
            row = int(rows[np.argmax(wrong)])
            runs = list(zip(found[rows == row].tolist(), starts[rows == row].tolist(), strict=True))
            raise ValueError(
                f"row {row}: segment ids {problem}; (id, offset) of its runs: {runs}; "
                f"pack with plan_packing(..., alignment={alignment})"
            )
