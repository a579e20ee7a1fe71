"""Config -> a run folder with checkpoints and metrics: the Lightning side."""
