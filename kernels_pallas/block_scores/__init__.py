"""Compressed attention fused with the choice of key blocks, and the choice alone."""

from kernels_pallas.block_scores.api import block_scores, entry_lse, select_blocks
from kernels_pallas.block_scores.pooling import BlockScores, Pooling

__all__ = ["BlockScores", "Pooling", "block_scores", "entry_lse", "select_blocks"]
