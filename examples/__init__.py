"""Recipes that can be run and read."""
