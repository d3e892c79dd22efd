"""The data and config layer that both engines share: NumPy and plain Python, no MLX, no torch."""
