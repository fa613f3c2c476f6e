"""Training-aware sparse attention for JAX.

Configs (``NSA``, ``Dense``) name a mechanism; ``build_mechanism`` makes its module; plain functions
(``nsa_attention``, ``dense_attention``, ``block_sparse_attention``) serve people who use no module
of ours. See :mod:`sparse_attn.types` for the axis alphabet and the contract's types.
"""

from kernels_pallas.block_sparse import block_sparse_attention
from kernels_pallas.ranged import ranged_attention
from sparse_attn.dense import Dense, DenseAttention, DenseCache
from sparse_attn.dsa import DSA, DSAAttention, DSACache, dsa_attention
from sparse_attn.functional import dense_attention, nsa_attention
from sparse_attn.hash_attention import HashAttention, HashMechanism, hash_attention
from sparse_attn.hash_cache import HashCache
from sparse_attn.infllm_v2 import (
    InfLLMV2,
    InfLLMV2Attention,
    InfLLMV2Cache,
    infllm_v2_attention,
)
from sparse_attn.moba import MoBA, MoBAAttention, MoBACache, moba_attention
from sparse_attn.nsa import NSA, NSAAttention
from sparse_attn.nsa_cache import NSACache
from sparse_attn.policies import (
    H2O,
    DoubleSparsity,
    Duo,
    OracleTopK,
    OracleTopP,
    Quest,
    RandomKeys,
    SnapKV,
    StreamingLLM,
    TokenSelect,
    calibrate_channels,
    calibrate_ranges,
    policy_attention,
)
from sparse_attn.registry import (
    MECHANISMS,
    POLICIES,
    MechanismConfig,
    build_mechanism,
    parse_mechanism,
    register,
    registered,
)
from sparse_attn.routing import Routing, RoutingAttention, routing_attention
from sparse_attn.routing_cache import RoutingCache
from sparse_attn.seer import Seer, SeerAttention, SeerCache
from sparse_attn.types import AttentionOutput, Aux, Heads, HeadShape, Selection, merge

__all__ = [
    "DSA",
    "H2O",
    "MECHANISMS",
    "NSA",
    "POLICIES",
    "AttentionOutput",
    "Aux",
    "DSAAttention",
    "DSACache",
    "Dense",
    "DenseAttention",
    "DenseCache",
    "DoubleSparsity",
    "Duo",
    "HashAttention",
    "HashCache",
    "HashMechanism",
    "HeadShape",
    "Heads",
    "InfLLMV2",
    "InfLLMV2Attention",
    "InfLLMV2Cache",
    "MechanismConfig",
    "MoBA",
    "MoBAAttention",
    "MoBACache",
    "NSAAttention",
    "NSACache",
    "OracleTopK",
    "OracleTopP",
    "Quest",
    "RandomKeys",
    "Routing",
    "RoutingAttention",
    "RoutingCache",
    "Seer",
    "SeerAttention",
    "SeerCache",
    "Selection",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "block_sparse_attention",
    "build_mechanism",
    "calibrate_channels",
    "calibrate_ranges",
    "dense_attention",
    "dsa_attention",
    "hash_attention",
    "infllm_v2_attention",
    "merge",
    "moba_attention",
    "nsa_attention",
    "parse_mechanism",
    "policy_attention",
    "ranged_attention",
    "register",
    "registered",
    "routing_attention",
]
