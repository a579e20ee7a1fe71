"""Builders of instruction shards from real datasets, one module per family."""
