"""Attention of a few queries over their listed key blocks, by gathering the blocks."""

from kernels_pallas.gather_decode.api import gather_blocks, gather_decode, gather_tokens
from kernels_pallas.gather_decode.blocked import as_tokens

__all__ = ["as_tokens", "gather_blocks", "gather_decode", "gather_tokens"]
