"""The second regularisation: move the knowledge of the chosen layers and channels to the others before the cut."""
