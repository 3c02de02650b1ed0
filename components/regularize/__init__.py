"""The second regularisation: what the chosen layers knew moves to the others."""
