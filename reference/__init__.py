"""ByteDance Lance in plain PyTorch: slow, readable, and written to agree with upstream operation by operation."""
