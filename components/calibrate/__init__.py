"""Calibrate: draw the windows of text on which layers and channels are chosen and models are trained."""
