"""The controls: what the same training does without regularising first."""
