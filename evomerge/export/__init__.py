"""What leaves a run: checkpoints, mergekit configurations, and their verification."""
