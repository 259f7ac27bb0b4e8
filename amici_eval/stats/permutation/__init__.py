"""Permutation nulls of explained variance: drawn, compiled, by FFT, by exact moments."""
