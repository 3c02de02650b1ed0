"""Figures that take long: no tests, and run by hand. Each module's docstring has its command."""
