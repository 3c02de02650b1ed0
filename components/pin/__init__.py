"""Pins what a run starts from: the release, its texts and the present champion."""
