"""What the bits must be: every operation in plain PyTorch, in one fixed order."""
