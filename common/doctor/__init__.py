"""What a machine can run, and whether both engines agree on a model: `twintune doctor`."""
