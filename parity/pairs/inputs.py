"""Which kinds of inputs a pair was given, and which mistakes of ports need others to show."""

from collections.abc import Mapping, Set
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
    lengths = {array.shape[1] for array in tokens}
    kinds = {
        # Rows that are alike show nothing that one does not.
        "a batch": any((array != array[:1]).any() for array in tokens),
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


def of_one_value(inputs: Any) -> tuple[list[str], bool]:
    """Those of the inputs that hold one value throughout, which shows nothing of what is done to each, and whether all
    are so; those of a single value are not counted."""
    arrays = {name: array for name, array in _arrays(inputs).items() if array.size > 1}
    alike = [name for name, array in arrays.items() if (array == array.flat[0]).all()]
    return alike, bool(arrays) and len(alike) == len(arrays)


def _tokens(inputs: Any) -> list[np.ndarray]:
    return [array for array in _arrays(inputs).values() if array.dtype.kind in "iu" and array.ndim == 2]


def _arrays(inputs: Any) -> dict[str, np.ndarray]:
    named = inputs if isinstance(inputs, Mapping) else {"the input": inputs}
    return {name: array for name, array in named.items() if isinstance(array, np.ndarray)}
