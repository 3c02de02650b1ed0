"""Moves the alias champion to a version whose files are whole."""
