"""Attention of every query over its own list of key blocks."""

from kernels_pallas.block_sparse.api import block_sparse_attention
from kernels_pallas.block_sparse.lists import union_ratio

__all__ = ["block_sparse_attention", "union_ratio"]
