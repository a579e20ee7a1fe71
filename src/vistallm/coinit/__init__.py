"""Instruction data: the task table and its templates, shards and their check, and the mini world."""
