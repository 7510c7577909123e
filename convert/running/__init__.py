"""Running a recipe: the plan first, then every stage through the public API, resumable."""
