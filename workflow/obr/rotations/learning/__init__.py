"""Learning rotations from calibration windows: one module per method."""
