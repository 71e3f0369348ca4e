"""Sweeps: hyperparameter search with Optuna on Ray Tune."""
