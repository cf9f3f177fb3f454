"""Recipes: whole trainings as plain functions, `freehold.recipes.sft.run` and its siblings."""
