"""Recipes: one YAML a file, read by `attnpatch.load_recipe`."""
