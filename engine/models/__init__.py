"""Layers on operations, the paged cache, draft heads."""
