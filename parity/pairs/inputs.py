"""Which kinds of inputs a pair was given, and which mistakes of ports need others to show."""

from collections.abc import Set
from typing import Any

import numpy as np

from parity.pairs.pair import Pair

# What configurations call the length of a window, and that of what was trained before positions were scaled.
WINDOWS = ("sliding_window", "attention_window", "window_size")
ORIGINAL = "original_max_position_embeddings"


def untried(pair: Pair, calls: Set[str]) -> list[str]:
    """Kinds of inputs that neither the pair's inputs nor its others are, in a few words each.

    Tokens are arrays of integers [batch, tokens] that are given by name or by themselves; where there are none nothing
    is said.
    """
    tokens = [found for inputs in (pair.inputs, *pair.also.values()) for found in _tokens(inputs)]
    if not tokens:
        return []
    batches, lengths = ({array.shape[axis] for array in tokens} for axis in (0, 1))
    kinds = {
        "a batch": max(batches) > 1,
        "one token alone": 1 in lengths or len(calls) > 1,
        "an odd number of tokens": any(length % 2 and length > 1 for length in lengths),
    }
    config = getattr(pair.trusted, "config", None)
    for name in WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and window > 0:
            kinds[f"more than the {window} tokens of {name}"] = max(lengths) > window
    original = (getattr(config, "rope_parameters", None) or {}).get(ORIGINAL)
    if isinstance(original, int):
        kinds[f"positions above {original}, where they are scaled"] = max(lengths) > original
    return [kind for kind, tried in kinds.items() if not tried]


def _tokens(inputs: Any) -> list[np.ndarray]:
    arrays = inputs.values() if isinstance(inputs, dict) else (inputs,)
    return [array for array in arrays if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.ndim == 2]
