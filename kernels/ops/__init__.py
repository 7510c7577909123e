"""Public functions of the kernels; each has a pure PyTorch reference with the same signature."""
