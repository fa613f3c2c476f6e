"""Brute force for mechanisms that list key blocks: plain NumPy on one document."""

import numpy as np


def logsumexp(x):
    """Over all of x; -inf if there is nothing."""
    x = np.asarray(x, np.float64)
    if x.size == 0 or np.all(np.isneginf(x)):
        return -np.inf
    return x.max() + np.log(np.exp(x - x.max()).sum())


def best_blocks(scores, count, forced):
    """``forced`` and the best others of blocks 0, 1, ..; later ones first among equals."""
    others = sorted(
        (j for j in range(len(scores)) if j not in forced),
        key=lambda j: (scores[j], j),
        reverse=True,
    )
    return sorted([*forced, *others[: max(0, count - len(forced))]])


def attend_listed(q, k, v, lists, size):
    """Token-causal attention of q [T, N, H] over lists[t][n] of blocks of k [T, K, H] and v."""
    T, N, H = q.shape
    group = N // k.shape[1]
    out = np.zeros((T, N, v.shape[2]))
    for t in range(T):
        for n in range(N):
            tokens = [s for j in lists[t][n] for s in range(size * j, size * (j + 1)) if s <= t]
            logits = k[tokens, n // group] @ q[t, n] / np.sqrt(H)
            p = np.exp(logits - logits.max())
            out[t, n] = p / p.sum() @ v[tokens, n // group]
    return out


def listed(indices, t, j):
    """The blocks that row t of one document lists, checked to be ascending with -1 at the end."""
    row = np.asarray(indices)[t, j]
    blocks = row[row >= 0]
    assert (row[: len(blocks)] == blocks).all()
    assert (np.diff(blocks) > 0).all()
    return blocks.tolist()


def layout(lengths, alignment, total):
    """(segment ids [total], starts) of documents that start at multiples of ``alignment``."""
    ids, starts, at = np.zeros(total, np.int32), [], 0
    for number, length in enumerate(lengths):
        starts.append(at)
        ids[at : at + length] = number + 1
        at += -(-length // alignment) * alignment
    assert at <= total + alignment
    return ids, starts
