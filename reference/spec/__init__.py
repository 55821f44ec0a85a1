"""What is agreed on, as data."""
