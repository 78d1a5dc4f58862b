"""Studies: declarative specs, the runner, claims and their verdicts."""
