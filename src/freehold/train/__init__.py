"""Training: data, steps and schedules. Recipes put them together."""
