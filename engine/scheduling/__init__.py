"""Requests, scheduler and blocks: no tensors."""
