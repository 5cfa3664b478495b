"""Kernels of decoding-time alignment: logits of several models mixed and sampled in one pass, edits of hidden states.

CUDA tensors run Triton kernels, others the plain PyTorch definitions in `reference`.
"""

from . import layers
from .ops.edits import BasisTable, EditTable, add_edit_rmsnorm, edit_
from .ops.logits import mix_sample, rank

__all__ = ["BasisTable", "EditTable", "add_edit_rmsnorm", "edit_", "layers", "mix_sample", "rank"]
