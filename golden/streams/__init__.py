"""What a run is: tokens, drafts, traces."""
