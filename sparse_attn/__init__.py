"""Training-aware sparse attention for JAX.

Configs (``NSA``, ``Dense``) name a mechanism; ``build_mechanism`` makes its module; plain functions
(``nsa_attention``, ``dense_attention``, ``block_sparse_attention``) serve people who use no module
of ours. See :mod:`sparse_attn.types` for the axis alphabet and the contract's types.
"""

from kernels_pallas.block_sparse import block_sparse_attention
from kernels_pallas.ranged import ranged_attention
from sparse_attn.dense import Dense, DenseAttention, DenseCache
from sparse_attn.functional import dense_attention, nsa_attention
from sparse_attn.nsa import NSA, NSAAttention
from sparse_attn.nsa_cache import NSACache
from sparse_attn.registry import (
    MECHANISMS,
    POLICIES,
    MechanismConfig,
    build_mechanism,
    register,
    registered,
)
from sparse_attn.types import AttentionOutput, Aux, Heads, HeadShape, Selection, merge

__all__ = [
    "MECHANISMS",
    "NSA",
    "POLICIES",
    "AttentionOutput",
    "Aux",
    "Dense",
    "DenseAttention",
    "DenseCache",
    "HeadShape",
    "Heads",
    "MechanismConfig",
    "NSAAttention",
    "NSACache",
    "Selection",
    "block_sparse_attention",
    "build_mechanism",
    "dense_attention",
    "merge",
    "nsa_attention",
    "ranged_attention",
    "register",
    "registered",
]
