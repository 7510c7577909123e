"""Ready-made recipes as data: reach them by `importlib.resources.files(__name__)`."""
