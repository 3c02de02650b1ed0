"""The controls: the same training without regularising first."""
