"""Whole training steps and programs: time, memory, where it goes, projections."""
