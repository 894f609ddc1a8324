"""Megatron checkpoints, read and written with PyTorch alone."""
