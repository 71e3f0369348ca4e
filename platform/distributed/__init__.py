"""Training and evaluation on Ray workers."""
