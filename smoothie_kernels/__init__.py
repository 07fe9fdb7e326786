"""Fused kernels for text diffusion: the vocabulary-wide step of Smoothie (arXiv 2505.18853) in one pass."""

from smoothie_kernels import noise
from smoothie_kernels.ops import NearestToken, SmoothieStep, fused_smoothie_step, nearest_token
from smoothie_kernels.recall import expected_recall
from smoothie_kernels.topk import TopK
from smoothie_kernels.vocabulary import Vocabulary

__all__ = [
    "NearestToken",
    "SmoothieStep",
    "TopK",
    "Vocabulary",
    "expected_recall",
    "fused_smoothie_step",
    "nearest_token",
    "noise",
]
__version__ = "0.1.0"
