"""Triton kernels; imported on CUDA alone."""
