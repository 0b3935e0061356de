"""How a run is carried out and kept: checkpoints, the lock on its folder. Knows nothing of transformers."""
