"""What surrounds the weights of a finished checkpoint: config.json and the model card."""
