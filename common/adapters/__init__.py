"""Adapters on the disk: ours, PEFT's and mlx-lm's, read with suspicion."""
