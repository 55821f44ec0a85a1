"""Slow independent twins of the reference."""
