"""Models: names, specifications, loading, checkpoints, token layouts."""
