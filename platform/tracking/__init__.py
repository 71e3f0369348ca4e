"""Tracking store: MLflow runs, artifacts and the storage directory."""
