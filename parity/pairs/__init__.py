"""Pairs of models: any PyTorch model that is trusted, and a port of it to MLX."""

from parity.pairs.localize import localize_pair
from parity.pairs.pair import Pair, Part
from parity.pairs.weights import copy_weights

__all__ = ["Pair", "Part", "copy_weights", "localize_pair"]
