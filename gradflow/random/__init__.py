"""Random numbers addressed by seed, step and path."""
