"""Parity of lance_mlx and reference with tensors captured from bytedance/Lance."""
