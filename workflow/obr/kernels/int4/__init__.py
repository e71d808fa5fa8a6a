"""4-bit weights by 8- or 4-bit activations on CPUs: C++ for AVX-512, AVX2 and others, compiled on first use."""
