"""Compressed attention fused with the choice of key blocks."""

from kernels_pallas.block_scores.api import block_scores
from kernels_pallas.block_scores.pooling import BlockScores, Pooling

__all__ = ["BlockScores", "Pooling", "block_scores"]
