"""The trainer: settings, the loop, the optimizer, ranks, checkpoints, and what a run reports."""
