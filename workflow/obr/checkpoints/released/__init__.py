"""Checkpoints as the authors of OBR released them: QuaRot's, SpinQuant's and FlatQuant's layouts."""
