"""Training: one loop, what it can train, objectives, checkpoints."""
