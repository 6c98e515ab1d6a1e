"""The adaptation loop: recipes, objectives, stages, epochs, checkpoints."""
