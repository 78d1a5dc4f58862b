"""What a run leaves: paths or statistics, in memory and on disk."""
