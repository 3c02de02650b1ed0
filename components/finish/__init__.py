"""Finish: close the run, whether it succeeded or failed."""
