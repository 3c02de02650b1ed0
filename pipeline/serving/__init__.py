"""Serving of a registered version: its manifest, its image, a server for it here, and the reconciler that follows an alias."""
