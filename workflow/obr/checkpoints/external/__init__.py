"""Checkpoints that other programs quantised: read, dequantised layer by layer, evaluated as any model is."""
