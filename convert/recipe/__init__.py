"""Recipes: YAML files that name a method, its data and the stages of a run, read strictly."""
