"""What is said beside a verdict: what was not compared, computed elsewhere or otherwise, or shows nothing."""

from collections.abc import Sequence

from parity.oracle.bounds import Bounds
from parity.pairs.mlx_side import MlxSide
from parity.pairs.names import kind_of
from parity.tensors.recording import Recording

# Parts that are named where there are more.
SHOWN = 8


def remarks(taps: Recording, steered: MlxSide, bounds: Bounds, lacking: Sequence[str], unloaded: bool) -> str:
    """What is to be said beside a verdict; `taps` are the trusted model's, `unloaded` says that no weight was alike."""
    absent = dict.fromkeys(kind_of(name) for name in taps if name not in steered.taps)
    elsewhere = dict.fromkeys(kind_of(name) for name in steered.taps if name not in bounds.taps)
    said = [f"not compared, for the port computes no such thing: {listed(list(absent))}"] if absent else []
    if unloaded:
        said.append("no weight is the trusted model's: see that the port was given them, or use copy_weights")
    if steered.wider:
        kinds = list(dict.fromkeys(map(kind_of, steered.wider)))
        said.append(f"computed in float32 what is bfloat16 in the trusted model: {listed(kinds)}")
    if elsewhere:
        said.append(f"differs, but all that comes of it is right: {listed(list(elsewhere))}")
    if steered.moved:
        said.append(f"its channels stand elsewhere than the trusted model's: {listed(steered.moved)}")
    if dull := dict.fromkeys(kind_of(name) for name in bounds.taps if not taps[name].array.any()):
        said.append(f"0 throughout, which shows nothing: {listed(list(dull))}")
    if lacking:
        said.append(f"lacking on purpose: {listed(list(lacking))}")
    return "; ".join(said)


def listed(names: list[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
