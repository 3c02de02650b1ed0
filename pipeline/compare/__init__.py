"""A comparison: recipes × ratios × seeds on one release, and the page that shows them side by side."""
