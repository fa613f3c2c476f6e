"""The specification of gathered decoding is that of block-sparse attention."""

from kernels_pallas.block_sparse.reference import block_sparse_attention as gather_decode

__all__ = ["gather_decode"]
