"""Pairs of models: any PyTorch model that is trusted, and a port of it to MLX."""
