"""Ablations: arms from configs/ablations.yaml, the runs they need, and what the runs say of each claim."""
