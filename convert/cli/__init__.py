"""The command line: one verb per file; each parses, calls `adaconvert.api` and prints.

Nothing here imports torch, numpy or transformers at module level, so `--help` is instant.
"""
