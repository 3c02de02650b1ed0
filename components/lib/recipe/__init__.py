"""The recipe: its types, its loading, and the messages for its errors."""
