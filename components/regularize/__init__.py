"""The second regularisation: what the layers and channels that go knew moves to the rest."""
