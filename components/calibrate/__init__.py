"""Calibrate: draw the windows that a method chooses and trains on."""
