"""Text, tokens and images for everything that measures, calibrates or trains."""
