"""Training, checkpoints, evaluation and weights."""
