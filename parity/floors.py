"""What rounding alone does: how far equally right variants of the reference are from a bundle's taps.

Every variant computes what the reference computes, in another order of rounding: attention by an explicit softmax, in
float64, or a few queries at a time; products in float64, padded, by the processor's own kernels, or disturbed by what
another order of summing would do; another number of threads; for float32 everything in float64, and every tap off by
a unit in its last place. A tap's floor is the largest of their errors. The errors are measured twice: from the oracle's
input (local) and from the run's own (free).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import reference.sampler
from parity.bundle import Bundle
from parity.implementations import one_line
from parity.metrics import compare
from parity.oracle import Oracle, cut, load_run, run_passes
from parity.recording import Recording, Tap
from parity.registry import parse
from parity.replay_torch import TorchReplay
from parity.rounding import quantum
from parity.sketch import Sketch
from reference.numerics import Numerics
from reference.sampler import norm

LOCAL, FREE = "local", "free"
"""Kinds of floors: from the oracle's input, and from the run's own."""
OWN = "the reference itself:own"
"""The first variant: the reference as it is."""
# Ratios that are kept: the threshold hangs on the largest tenth alone.
_LARGEST = 2000
_LATER_TOKENS = re.compile(r"cond\.decode[1-9]")
# Components whose last sum is that of a norm, whichever way the products before it are summed.
_NORMED = re.compile(r"norm|ln_q|guidance|residual\.[03]$|head\.0$")


Progress = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One equally right way to compute.

    Attributes:
        family: variants of one family round alike; the threshold leaves them out together.
        numerics: the reference's.
        threads: PyTorch's.
        draw: which errors are drawn at the taps: of their last place, or where `sums` is set of the sums in norms.
    """

    name: str
    family: str
    numerics: Numerics
    threads: int = 1
    draw: int = 0
    sums: bool = False


@dataclass(frozen=True, eq=False)
class Floors:
    """Errors of equally right variants, relative L2.

    Attributes:
        variants: their names, and after a colon their families.
        errors: float32 [variants] by tap name.
        ratios: how far families of variants are over the floors that the others give, the largest of them in falling
            order, float32, by the taps' dtype; of all taps that the reference computes, those without a floor included.
        count: how many ratios there are in all, by dtype.
        upstream: relative distance of upstream's bfloat16 taps from the reference's float32 ones; only for FREE.
        leading: how many tokens of an answer all variants share with upstream's; None when they share all.
    """

    variants: tuple[str, ...]
    errors: dict[str, np.ndarray]
    ratios: dict[str, np.ndarray]
    count: dict[str, int]
    upstream: dict[str, float] = field(default_factory=dict)
    leading: int | None = None


def variants_of(dtype: str, kind: str = LOCAL) -> list[Variant]:
    """The equally right variants of a policy, for floors of a kind."""
    found = [
        Variant("explicit softmax", "attention", Numerics(dtype, "math")),
        Variant("attention in float64", "attention", Numerics(dtype, "float64")),
        Variant("attention in chunks", "attention", Numerics(dtype, "chunked")),
        Variant("products in float64", "products", Numerics(dtype, linear="float64")),
        Variant("padded batches", "products", Numerics(dtype, linear="padded")),
        Variant("two threads", "threads", Numerics(dtype), threads=2),
    ]
    for draw in (1, 2):
        found.append(_disturbed_sums(dtype, draw))
        found.append(Variant(f"a unit in every last place {draw}", "last place", Numerics(dtype), draw=draw))
    if dtype == "float32":
        return [*found, Variant("float64", "float64", Numerics("float64"))]
    if kind == FREE:
        # A run of its own carries every rounding on, so that variants which round almost alike end up alike and a few
        # others far from them: it takes more draws to see how far.
        found += [_disturbed_sums(dtype, draw) for draw in range(3, 7)]
    return [*found, Variant("the processor's own products", "native", Numerics(dtype, "math", "native"))]


def _disturbed_sums(dtype: str, draw: int) -> Variant:
    numerics = Numerics(dtype, "disturbed", "disturbed", draw)
    return Variant(f"disturbed sums {draw}", "sums", numerics, draw=draw, sums=True)


def measure_local(oracle: Oracle, progress: Progress | None = None) -> Floors:
    """Run every variant from the oracle's input; see local_floors."""
    names = floats_of(oracle.taps)

    def steered(run: TorchReplay) -> Recording:
        return cut(run, run_passes(run, oracle.passes))

    variants, recordings = _run_all(oracle.bundle, LOCAL, steered, progress)
    table = np.stack([errors_of(oracle.judged, taps, names) for taps in (oracle.own, *recordings)], 1)
    least = np.array([quantum(oracle.taps[name]) for name in names])
    variants = [OWN, *variants]
    dtypes = np.array([oracle.taps[name].dtype for name in names])
    return Floors(tuple(variants), dict(zip(names, table, strict=True)), *ratios_of(table, least, dtypes, variants))


def measure_free(bundle: Bundle, progress: Progress | None = None) -> Floors:
    """Run every variant from its own input; see free_floors."""
    with one_line(f"reference cannot run bundle {bundle.name}"):
        own = load_run(bundle, Numerics(bundle.dtype)).record()
    variants, recordings = _run_all(bundle, FREE, TorchReplay.record, progress)
    expected = {name: tap for name, tap in (own | bundle.expected).items() if name not in bundle.inputs}
    names = floats_of(expected)
    table = np.stack([errors_of(expected, taps, names) for taps in (own, *recordings)], 1)
    least = np.array([quantum(expected[name], bundle.dtype) for name in names])
    # Once the answers part, what follows is another text.
    alike = np.array([not _LATER_TOKENS.match(name) for name in names])
    variants = [OWN, *variants]
    # A float32 tap of a bfloat16 run follows from states of that dtype.
    dtypes = np.full(len(names), bundle.dtype)
    ratios = ratios_of(table[alike], least[alike], dtypes[alike], variants)
    upstream: dict[str, float] = {}
    kept = floats_of(bundle.expected)
    if bundle.dtype != "float32":
        exact = load_run(bundle, Numerics("float32")).record(set(kept))
        upstream = dict(zip(kept, errors_of(bundle.expected, exact, kept).tolist(), strict=True))
    errors = {name: values for name, values in zip(names, table, strict=True) if name in bundle.expected}
    answers = [taps.get("tokens") for taps in (own, *recordings)]
    leading = _leading(bundle.taps.get("tokens"), answers)
    return Floors(tuple(variants), {name: errors[name] for name in kept}, *ratios, upstream, leading)


def ratios_of(
    table: np.ndarray, least: np.ndarray, dtypes: np.ndarray, variants: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Errors of each family over the floors that the others give; see Floors.ratios and Floors.count."""
    families = np.array([variant.rpartition(":")[2] for variant in variants])
    ratios: dict[str, np.ndarray] = {}
    for dtype in ("float32", "bfloat16"):
        rows = dtypes == dtype
        found = [np.zeros(0, np.float32)]
        for family in dict.fromkeys(families.tolist()):
            own, others = table[rows][:, families == family], table[rows][:, families != family]
            found.append((own / np.maximum(others.max(1, initial=0.0), least[rows])[:, None])[own > 0])
        ratios[dtype] = np.sort(np.concatenate(found).astype(np.float32))[::-1]
    return {d: found[:_LARGEST] for d, found in ratios.items()}, {d: len(found) for d, found in ratios.items()}


def _run_all(
    bundle: Bundle, kind: str, run: Callable[[TorchReplay], Recording], progress: Progress | None
) -> tuple[list[str], list[Recording]]:
    names, recordings = [], []
    with one_line(f"reference cannot run bundle {bundle.name}"):
        for variant in variants_of(bundle.dtype, kind):
            if progress:
                progress(f"floors: {variant.name}")
            names.append(f"{variant.name}:{variant.family}")
            recordings.append(run_variant(variant, lambda variant=variant: run(load_run(bundle, variant.numerics))))
    return names, recordings


def floats_of(taps: Mapping[str, Tap | Sketch]) -> list[str]:
    """Names of the taps that are no integers, which have floors."""
    return [name for name, tap in taps.items() if tap.dtype != "int32"]


def run_variant(variant: Variant, run: Callable[[], Recording]) -> Recording:
    """What `run` computes with a variant's threads, with the errors that the variant draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(variant.threads)
    # Of a float32 run the errors are drawn afterwards.
    rounded = variant.sums and variant.numerics.dtype == "bfloat16"
    norms = patch.object(reference.sampler, "norm", _DisturbedNorm(variant.draw)) if rounded else nullcontext()
    try:
        with norms:
            taps = run()
    finally:
        torch.set_num_threads(threads)
    if not variant.draw:
        return taps
    return {name: _disturbed(name, tap, [variant.draw, i], variant.sums) for i, (name, tap) in enumerate(taps.items())}


class _DisturbedNorm:
    """Takes the place of reference.sampler.norm: sums of squares as far off as those of many roundings may be.

    One bfloat16 number scales a whole velocity, so where it lies near the middle between two, it matters which way a
    sum is off: the norms of one guidance are off by two standard deviations in opposite ways, the other draw's in the
    other ways.
    """

    def __init__(self, draw: int) -> None:
        self._sign = 1 if draw % 2 else -1

    def __call__(self, v: Tensor, dim: int | None = None) -> Tensor:
        count = v.numel() if dim is None else v.shape[dim]
        self._sign = -self._sign
        return (norm(v.double(), dim) * (1 + 2 * self._sign * _sum_error(count))).to(v.dtype)


def _sum_error(count: int) -> float:
    """Standard deviation, relative, of the root of a sum of so many squares: each of so many roundings, as it grows, is
    off by a part of a unit in the last place."""
    return count**0.5 * 2.0**-26


def _disturbed(name: str, tap: Tap, seed: list[int], sums: bool) -> Tap:
    """A float32 tap with the errors of one unit in its last place, or of the sums that norm each of its rows."""
    if tap.dtype != "float32":
        return tap
    component = parse(name).component
    if sums and not _NORMED.search(component):
        return tap
    draw = np.random.default_rng(seed)
    if not sums:
        noise = draw.uniform(-1, 1, tap.array.shape) * 2.0**-23
    elif component == "guidance":
        noise = draw.standard_normal() * _sum_error(tap.array.size)
    else:
        axis = 1 if "vae." in component else -1
        shape = [1 if i == axis % tap.array.ndim else n for i, n in enumerate(tap.array.shape)]
        noise = draw.standard_normal(shape) * _sum_error(tap.array.shape[axis])
    return Tap((tap.array * (1 + noise)).astype(np.float32), tap.dtype)


def errors_of(expected: Mapping[str, Tap | Sketch], got: Mapping[str, Tap], names: Sequence[str]) -> np.ndarray:
    """Relative errors, float32 [names]; 0 where one side has no value or another shape: it says nothing of rounding."""
    errors = np.zeros(len(names), np.float32)
    for index, name in enumerate(names):
        if name in got:
            # The dtypes differ where one side is wider on purpose: only values count here.
            error = compare(replace(expected[name], dtype="float32"), replace(got[name], dtype="float32")).rel_l2
            errors[index] = error if error is not None and np.isfinite(error) else 0.0
    return errors


def _leading(expected: Tap | None, answers: Sequence[Tap | None]) -> int | None:
    shared = [count for other in answers if other and (count := shared_start(expected, other)) is not None]
    return min(shared, default=None)


def shared_start(a: Tap, b: Tap) -> int | None:
    """How many leading tokens two answers share, None when they are equal."""
    length = min(len(a.array), len(b.array))
    different = np.flatnonzero(a.array[:length] != b.array[:length])
    if different.size:
        return int(different[0])
    return None if len(a.array) == len(b.array) else length
