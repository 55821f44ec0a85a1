"""Prompts, models and what a golden notes of them."""
