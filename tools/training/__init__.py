"""Scripts that trained the small committed checkpoints."""
