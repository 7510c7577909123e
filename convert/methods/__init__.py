"""Conversion methods: each turns opened sources and options into a plan."""
