"""Pairs of models: any PyTorch model that is trusted, and a port of it to MLX."""

from parity.pairs.localize import assert_pair_agrees, localize_pair
from parity.pairs.pair import Pair, Part
from parity.pairs.weights import copy_weights

__all__ = ["Pair", "Part", "assert_pair_agrees", "copy_weights", "localize_pair"]
