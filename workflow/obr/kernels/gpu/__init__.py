"""Packed weights of 2 to 4 bits on GPUs: Triton kernels for few tokens, and rows unpacked for many.

layout.py lays codes and masks out, on any device; programs.py holds the Triton kernels; product.py calls them;
ahead_of_time.py compiles them without a GPU. Triton is optional: PyTorch for CUDA brings it.
"""
