"""Statistics of a model on calibration data: Hessians and gradients."""
