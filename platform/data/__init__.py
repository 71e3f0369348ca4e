"""Datasets, augmentation and user images."""
