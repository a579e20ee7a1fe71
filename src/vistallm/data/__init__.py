"""Tar shards -> samples -> sequences -> batches."""
