"""Triton's interpreter mode with exact operations."""
