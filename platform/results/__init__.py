"""Evaluation, certification and reports of trained networks."""
