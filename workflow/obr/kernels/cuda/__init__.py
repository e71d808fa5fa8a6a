"""4-bit codes on tensor cores: dense, and half of them zero in aligned pairs of 4:8, the only form that these take.

operands.py lays codes and metadata out, on any machine; library.py compiles gemm.cu and calls it, on CUDA devices.
"""
