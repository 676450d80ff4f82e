"""Kernels on raw arrays: packed codes in, numbers out. Imports jax only and is usable alone."""
