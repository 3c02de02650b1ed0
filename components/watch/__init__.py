"""Finds which releases are new, and claims each for one watcher."""
