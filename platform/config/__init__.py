"""Recipes, overrides, settings and schedules."""
