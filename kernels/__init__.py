"""Fused operations, one a file: the formula, its definition in PyTorch, the kernel in Triton, the function to call.

Importing works without triton and without a GPU; CHATPIXIU_KERNELS=auto|torch|triton decides (backend.py).
"""
