from lance_mlx.media.write import read_metadata

__all__ = ["read_metadata"]
