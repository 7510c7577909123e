"""The runtime of adaptive checkpoints; its flat files are copied into every checkpoint it runs."""
