"""Evaluate: measure quality, size and speed of every model in one environment."""
