"""Plans: what every target tensor is made of, checked for completeness and sized before any
work."""
