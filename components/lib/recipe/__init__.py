"""The recipe: its types, how it is read, and the words for its faults."""
