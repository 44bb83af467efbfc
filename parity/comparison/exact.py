"""What must be equal before any activation means anything: weights, tokens, roles, splits, positions, times, noise."""

import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from parity.model import definition
from parity.oracle.oracle import Oracle
from parity.oracle.visuals import differing_visuals
from parity.ports.port import Port
from parity.tensors.metrics import bits
from parity.tensors.recording import ExactInputs, Observed, Recording

# In the order in which a run needs them: an earlier one decides what the later ones mean.
ORDER = (
    "inputs/request",
    "inputs/text_ids",
    "inputs/modality",
    "inputs/split_lens",
    "inputs/attn_modes",
    "inputs/grids_thw",
    "inputs/answer",
    "inputs/text_ids.uncond",
    "inputs/position_ids.cond",
    "inputs/position_ids.uncond",
    "inputs/timesteps",
    "inputs/guided",
)

TIMES_ROUNDED = 2.0**-21
"""How far float32 times may be off: a shift of 10 makes four times as much of two roundings of a unit in the last place
of 1. Sums of intervals are off by more."""


@dataclass(frozen=True, eq=False)
class ExactMismatch:
    """Something that had to be equal and is not.

    Attributes:
        tap: `inputs/...` or `weights/...`.
        expected, got: both arrays; `got` is None where nothing came, `expected` where nothing was to come.
        detail: one sentence with the first values that differ.
        shared: along the last axis, which values the port has, as booleans; `got` has the oracle's for the others.
            None where it has all.
    """

    tap: str
    expected: np.ndarray | None
    got: np.ndarray | None
    detail: str
    shared: np.ndarray | None = None

    @property
    def error(self) -> float | None:
        """Relative L2 error, None where the two cannot be subtracted."""
        if self.expected is None or self.got is None or self.expected.shape != self.got.shape:
            return None
        norm = float(np.linalg.norm(self.expected.astype(np.float64)))
        return float(np.linalg.norm(self.got.astype(np.float64) - self.expected)) / norm if norm else None


@dataclass(frozen=True, eq=False)
class WeightCheck:
    """All weights of a port against the oracle's: which differ, how many were compared, and a sum over them all."""

    mismatches: list[ExactMismatch]
    compared: int
    checksum: str


def check_weights(port: Port, oracle: Oracle) -> WeightCheck:
    """Compare all parameters bit for bit."""
    expected = dict(definition().oracle_weights(oracle))
    mismatches, seen, checksum = [], set(), 0
    for name, array in expected.items():
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, zlib.crc32(name.encode(), checksum))
    for name, got in port.weights():
        wanted = expected.get(name)
        if wanted is None:
            continue
        seen.add(name)
        if got.size == wanted.size and got.ndim != wanted.ndim:
            got = got.reshape(wanted.shape)  # a norm's scale has axes of length 1 in one of the two
        if got.shape != wanted.shape or not np.array_equal(bits(got), bits(wanted)):
            mismatches.append(ExactMismatch(f"weights/{name}", wanted, got, describe(name, wanted, got)))
    # What a part of the model has that the port lacks, nothing of it is computed with.
    for name in (name for name in expected if name not in seen and not port.partial):
        mismatches.append(ExactMismatch(f"weights/{name}", expected[name], None, f"{name} is not among the parameters"))
    return WeightCheck(mismatches, len(seen), f"crc32:{checksum:08x}")


def check_exact(exact: ExactInputs, observed: Observed) -> Iterator[ExactMismatch]:
    """Compare the exact arrays in order."""
    for name in ORDER:
        if name in observed.failures:
            yield ExactMismatch(name, exact.arrays.get(name), None, observed.failures[name])
            continue
        expected, got = exact.arrays.get(name), observed.exact.get(name)
        if expected is None or (got is None and "inputs/request" in observed.failures):
            continue
        if got is None:
            # What a run has no use for, such as positions of an arm that never runs, is not computed.
            continue
        array, shared = got.array, None
        if (lacking := observed.absent.get(name)) is not None and lacking.shape == expected.shape[-1:]:
            shared, array = ~lacking, expected.astype(got.array.dtype)
            array[..., shared] = got.array
        if expected.shape != array.shape or not (np.array_equal(expected, array) or _rounded(expected, array)):
            yield ExactMismatch(name, expected, array, describe(name, expected, array), shared)


def _rounded(expected: np.ndarray, got: np.ndarray) -> bool:
    """Whether times differ as rounding makes them; integers may not."""
    return expected.dtype == np.float32 and np.allclose(got, expected, rtol=0, atol=TIMES_ROUNDED)


def rounding_of_times(exact: ExactInputs, observed: Observed) -> str:
    """Say how far times are off by rounding, which is no mismatch; nothing where they are equal, or are one."""
    name = "inputs/timesteps"
    expected, got = exact.arrays.get(name), observed.exact.get(name)
    if expected is None or got is None or expected.shape != got.array.shape or not _rounded(expected, got.array):
        return ""
    off, most = np.sum(got.array != expected), np.abs(got.array - expected).max()
    return f"{off} of {expected.size} timesteps are off by up to {most:.1g}, as rounding makes them" if off else ""


def check_preprocessed(
    computed: Mapping[str, np.ndarray] | None, inputs: Recording, drawn: Container[str] = ()
) -> Iterator[ExactMismatch]:
    """Compare how visuals are resized with what upstream's run was given; see differing_visuals."""
    for name, expected, got in differing_visuals(computed or {}, inputs, drawn):
        yield ExactMismatch(f"inputs/{name}", expected, got, describe(name, expected, got))


def describe(name: str, expected: np.ndarray, got: np.ndarray) -> str:
    """Say in one sentence where two arrays differ first."""
    shown = name.removeprefix("inputs/")
    if expected.shape != got.shape:
        return f"{shown} has shape {list(got.shape)}, the oracle's has {list(expected.shape)}"
    different = np.argwhere(expected != got)
    if not len(different):
        return f"{shown} is equal"
    at = tuple(int(i) for i in different[0])
    count = f"{len(different)} of {expected.size} values differ"
    return f"{shown} is {got[at]:.7g} at {list(at)} where the oracle has {expected[at]:.7g}; {count}"
