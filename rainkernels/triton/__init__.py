"""Triton kernels and their launchers, one module per family. Reached through rainkernels.ops only."""
