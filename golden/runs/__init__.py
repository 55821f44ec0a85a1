"""How something is run to be checked."""
