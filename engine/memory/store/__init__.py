"""The packed store: weights as a run wants them, made once from a checkpoint."""
