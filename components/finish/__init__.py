"""Closes the run, whatever became of it."""
