"""Serving of a registered version: its manifest, a server for it here, and the reconciler that follows an alias."""
