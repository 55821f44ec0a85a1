"""Batched runs of whole models on the kernels."""
