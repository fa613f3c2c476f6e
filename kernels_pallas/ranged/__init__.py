"""Attention of every query row over one contiguous range of keys."""

from kernels_pallas.ranged.api import ranged_attention

__all__ = ["ranged_attention"]
