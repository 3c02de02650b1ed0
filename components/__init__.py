"""What runs inside the containers: the stages, and what they stand on. Imports nothing of `pipeline`."""
