"""Text and tokens for everything that measures, calibrates or trains."""
