"""Attention of a few queries over their listed key blocks, by gathering the blocks."""

from kernels_pallas.gather_decode.api import gather_decode

__all__ = ["gather_decode"]
