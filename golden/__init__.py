"""What the reference said, kept: golden token streams, their store, and the checks against it."""
