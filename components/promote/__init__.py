"""Promote: move the alias champion to a version with intact files."""
