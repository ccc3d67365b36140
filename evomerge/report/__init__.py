"""What a run found, for people and as JSON."""
