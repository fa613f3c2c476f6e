"""Scores between packed binary codes, and the exact selection of the best keys by them."""

from kernels_pallas.hamming.api import hamming_scores, hamming_select, hamming_threshold
from kernels_pallas.hamming.codes import Threshold, code_signs, pack_codes

__all__ = [
    "Threshold",
    "code_signs",
    "hamming_scores",
    "hamming_select",
    "hamming_threshold",
    "pack_codes",
]
