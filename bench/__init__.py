"""Measurements: speed, memory, floors, curves; their results are JSON files in results/."""
