"""What rounding alone does: how far equally right variants of the reference are from a bundle's taps.

Every variant computes what the reference computes, in another order of rounding: attention by an explicit softmax, in
float64, or a few queries at a time; products in float64, padded, by the processor's own kernels, or disturbed by what
another order of summing would do; another number of threads; for float32 everything in float64, and every tap off by
a unit in its last place. A tap's floor is the largest of their errors. The errors are measured twice: from the oracle's
input (local) and from the run's own (free).

The threshold on error / floor is measured too. Each variant in turn is taken for an implementation under test and the
others for its floor; the logarithms of these ratios beyond their nine-tenth quantile are fitted by a generalized Pareto
distribution (by its moments), and the threshold is where its tail, over all taps compared, leaves a chance of
FALSE_ALARM for a false alarm anywhere in the run (Bonferroni's bound, which holds however the taps depend on each
other).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parity.bundle import Bundle
from parity.errors import ParityError
from parity.findings import Alarm
from parity.implementations import one_line
from parity.metrics import compare
from parity.oracle import Oracle, cut, load_run, run_passes
from parity.recording import Recording, Tap, write_atomically
from parity.registry import parse
from parity.replay_torch import TorchReplay
from reference.numerics import Numerics

FALSE_ALARM = 0.01
"""Largest chance that a run of equally right implementations is called wrong anywhere."""
LOCAL, FREE = "local", "free"
"""Kinds of floors: from the oracle's input, and from the run's own."""
FILE = "floors.safetensors"
_FORMAT = "lance-floors/1"
# Ratios that are kept: the threshold hangs on the largest tenth alone.
_LARGEST = 2000
_LATER_TOKENS = re.compile(r"cond\.decode[1-9]")
_OWN = "the reference itself:own"
_TAIL = 0.1
# The relative size of one unit in the last place is 2**-bits to 2**(1 - bits).
_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
# Whatever the size of a tap, one element in 25 may be off by one unit.
_FLIPPED_SHARE = 1 / 25
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
        ratios: how far families of variants are over the floors that the others give, the LARGEST of them in falling
            order, float32; of all taps that the reference computes, also those without a floor here.
        count: how many ratios there are in all.
        upstream: relative distance of upstream's bfloat16 taps from the reference's float32 ones; only for FREE.
        leading: how many tokens of an answer all variants share with upstream's; None when they share all.
    """

    variants: tuple[str, ...]
    errors: dict[str, np.ndarray]
    ratios: np.ndarray
    count: int
    upstream: dict[str, float] = field(default_factory=dict)
    leading: int | None = None


def variants_of(dtype: str) -> list[Variant]:
    """The equally right variants of a policy."""
    found = [
        Variant("explicit softmax", "attention", Numerics(dtype, "math")),
        Variant("attention in float64", "attention", Numerics(dtype, "float64")),
        Variant("attention in chunks", "attention", Numerics(dtype, "chunked")),
        Variant("products in float64", "products", Numerics(dtype, linear="float64")),
        Variant("padded batches", "products", Numerics(dtype, linear="padded")),
        Variant("two threads", "threads", Numerics(dtype), threads=2),
    ]
    for draw in (1, 2):
        disturbed = Numerics(dtype, "disturbed", "disturbed", draw)
        found.append(Variant(f"disturbed sums {draw}", "sums", disturbed, draw=draw, sums=True))
        found.append(Variant(f"a unit in every last place {draw}", "last place", Numerics(dtype), draw=draw))
    if dtype == "float32":
        return [*found, Variant("float64", "float64", Numerics("float64"))]
    return [*found, Variant("the processor's own products", "native", Numerics(dtype, "math", "native"))]


def local_floors(oracle: Oracle, progress: Progress | None = None) -> Floors:
    """Floors from the oracle's input for all taps: those stored with the bundle, or measured where none fit it.

    Raises ParityError when the reference cannot run.
    """
    stored = _read(oracle.bundle, LOCAL, _floats(oracle.taps), _names_sum(oracle.taps))
    return stored or measure_local(oracle, progress)


def free_floors(bundle: Bundle, progress: Progress | None = None) -> Floors:
    """Floors from a run's own input for the bundle's taps: those stored with it, or measured where none fit it.

    Raises ParityError when the reference cannot run.
    """
    stored = _read(bundle, FREE, _floats(bundle.taps), _names_sum(bundle.taps))
    return stored or measure_free(bundle, progress)


def measure_local(oracle: Oracle, progress: Progress | None = None) -> Floors:
    """Run every variant from the oracle's input; see local_floors."""
    names = _floats(oracle.taps)

    def steered(run: TorchReplay) -> Recording:
        return cut(run, run_passes(run, oracle.passes))

    variants, recordings = _run_all(oracle.bundle, steered, progress)
    table = np.stack([_errors(oracle.taps, taps, names) for taps in (oracle.own, *recordings)], 1)
    least = np.array([quantum(oracle.taps[name]) for name in names])
    variants = [_OWN, *variants]
    return Floors(tuple(variants), dict(zip(names, table, strict=True)), *_ratios(table, least, variants))


def measure_free(bundle: Bundle, progress: Progress | None = None) -> Floors:
    """Run every variant from its own input; see free_floors."""
    with one_line(f"reference cannot run bundle {bundle.name}"):
        own = load_run(bundle, Numerics(bundle.dtype)).record()
    variants, recordings = _run_all(bundle, TorchReplay.record, progress)
    expected = {name: tap for name, tap in (own | bundle.taps).items() if name not in bundle.inputs}
    names = _floats(expected)
    table = np.stack([_errors(expected, taps, names) for taps in (own, *recordings)], 1)
    least = np.array([quantum(expected[name], bundle.dtype) for name in names])
    # Once the answers part, what follows is another text.
    alike = np.array([not _LATER_TOKENS.match(name) for name in names])
    variants = [_OWN, *variants]
    ratios = _ratios(table[alike], least[alike], variants)
    upstream: dict[str, float] = {}
    kept = _floats(bundle.taps)
    if bundle.dtype != "float32":
        exact = load_run(bundle, Numerics("float32")).record(set(kept))
        upstream = dict(zip(kept, _errors(bundle.taps, exact, kept).tolist(), strict=True))
    errors = {name: values for name, values in zip(names, table, strict=True) if name in bundle.taps}
    answers = [taps.get("tokens") for taps in (own, *recordings)]
    leading = _leading(bundle.taps.get("tokens"), answers)
    return Floors(tuple(variants), {name: errors[name] for name in kept}, *ratios, upstream, leading)


def _ratios(table: np.ndarray, least: np.ndarray, variants: Sequence[str]) -> tuple[np.ndarray, int]:
    """Errors of each family over the floors that the others give; see Floors.ratios and Floors.count."""
    families = np.array([variant.rpartition(":")[2] for variant in variants])
    ratios = [np.zeros(0, np.float32)]
    for family in dict.fromkeys(families.tolist()):
        own, others = table[:, families == family], table[:, families != family]
        ratios.append((own / np.maximum(others.max(1, initial=0.0), least)[:, None])[own > 0])
    found = np.sort(np.concatenate(ratios).astype(np.float32))[::-1]
    return found[:_LARGEST], len(found)


def _run_all(
    bundle: Bundle, run: Callable[[TorchReplay], Recording], progress: Progress | None
) -> tuple[list[str], list[Recording]]:
    names, recordings = [], []
    with one_line(f"reference cannot run bundle {bundle.name}"):
        for variant in variants_of(bundle.dtype):
            if progress:
                progress(f"floors: {variant.name}")
            names.append(f"{variant.name}:{variant.family}")
            recordings.append(_run(bundle, variant, run))
    return names, recordings


def _floats(taps: Mapping[str, Tap]) -> list[str]:
    return [name for name, tap in taps.items() if tap.dtype != "int32"]


def _run(bundle: Bundle, variant: Variant, run: Callable[[TorchReplay], Recording]) -> Recording:
    threads = torch.get_num_threads()
    torch.set_num_threads(variant.threads)
    try:
        taps = run(load_run(bundle, variant.numerics))
    finally:
        torch.set_num_threads(threads)
    if not variant.draw:
        return taps
    return {name: _disturbed(name, tap, [variant.draw, i], variant.sums) for i, (name, tap) in enumerate(taps.items())}


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
        noise = draw.standard_normal() * tap.array.size**0.5 * 2.0**-26
    else:
        # A sum of n squares is rounded n times, as it grows: it is off by about sqrt(n) / 4 units in the last place.
        axis = 1 if "vae." in component else -1
        shape = [1 if i == axis % tap.array.ndim else n for i, n in enumerate(tap.array.shape)]
        noise = draw.standard_normal(shape) * tap.array.shape[axis] ** 0.5 * 2.0**-26
    return Tap((tap.array * (1 + noise)).astype(np.float32), tap.dtype)


def _errors(expected: Mapping[str, Tap], got: Mapping[str, Tap], names: Sequence[str]) -> np.ndarray:
    """Relative errors, float32 [names]; 0 where one side has no value or another shape: it says nothing of rounding."""
    errors = np.zeros(len(names), np.float32)
    for index, name in enumerate(names):
        if name in got:
            # The dtypes differ where one side is wider on purpose: only values count here.
            error = compare(Tap(expected[name].array, "float32"), Tap(got[name].array, "float32")).rel_l2
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


def quantum(tap: Tap, dtype: str | None = None) -> float:
    """The least floor of a tap: the error of one in 25, or sqrt(size), of its elements off by one last bit.

    `dtype` is that of the states that the tap is computed from, where those may be off by a bit as well.
    """
    share = max(_FLIPPED_SHARE, max(tap.array.size, 1) ** -0.5)
    return _ULP.get(dtype or tap.dtype, 0.0) * share**0.5


def floor(errors: np.ndarray, least: float) -> float:
    """The floor of a tap: the largest error of the variants, or the least that any tap has."""
    return max(float(errors.max(initial=0.0)), least)


def alarm(floors: Floors, taps: int) -> Alarm:
    """Fit the threshold on error / floor of a run that compares so many taps to what the families are to each other."""
    if not floors.count:
        return Alarm(FALSE_ALARM, taps, 1.0, 0)
    logs = np.log(floors.ratios.astype(np.float64))
    start = max(float(logs[min(int(_TAIL * floors.count), len(logs) - 1)]), 0.0)
    beyond = logs[logs > start] - start
    chance = FALSE_ALARM / max(taps, 1) / max(beyond.size / floors.count, FALSE_ALARM / max(taps, 1))
    far = _pareto_quantile(beyond, chance) if beyond.size > 1 else 0.0
    # Never below what was seen.
    return Alarm(FALSE_ALARM, taps, float(np.exp(max(start + far, logs[0]))), floors.count)


def local_bounds(oracle: Oracle, floors: Floors) -> tuple[dict[str, float], Alarm]:
    """The floor of every tap, and the threshold on errors over it."""
    return _bounds(floors, {name: quantum(oracle.taps[name]) for name in floors.errors})


def free_bounds(bundle: Bundle, floors: Floors) -> tuple[dict[str, float], Alarm]:
    """The same for runs from their own input, whose states are of the run's dtype and may be off by a bit."""
    return _bounds(floors, {name: quantum(bundle.taps[name], bundle.dtype) for name in floors.errors})


def _bounds(floors: Floors, least: Mapping[str, float]) -> tuple[dict[str, float], Alarm]:
    levels = {name: floor(errors, least[name]) for name, errors in floors.errors.items()}
    return levels, alarm(floors, len(levels))


def _pareto_quantile(excesses: np.ndarray, chance: float) -> float:
    """The excess that is exceeded with a given chance, by a generalized Pareto distribution of the same moments."""
    mean, spread = float(excesses.mean()), float(excesses.var())
    if not spread:
        return mean
    # An error is bounded, so in logarithms no tail is heavier than the exponential one, whose shape is 0.
    shape = min((1 - mean**2 / spread) / 2, 0.0)
    scale = mean * (1 - shape)
    return -scale * float(np.log(chance)) if shape > -1e-6 else scale / shape * (chance**-shape - 1)


def write_floors(path: Path, oracle: Oracle, local: Floors, free: Floors) -> None:
    """Write floors beside a bundle's taps, whole or not at all."""
    arrays = {
        LOCAL: _packed(np.stack(list(local.errors.values()))),
        FREE: _packed(np.stack(list(free.errors.values()))),
        f"{LOCAL}_ratios": _packed(local.ratios),
        f"{FREE}_ratios": _packed(free.ratios),
        "upstream": _packed(np.array(list(free.upstream.values()), np.float32)),
    }
    metadata = {
        "format": _FORMAT,
        "taps_sha256": _taps_sum(oracle.bundle),
        f"{LOCAL}_names": _names_sum(oracle.taps),
        f"{FREE}_names": _names_sum(oracle.bundle.taps),
        "variants": json.dumps(local.variants),
        f"{LOCAL}_count": str(local.count),
        f"{FREE}_count": str(free.count),
        "leading": json.dumps(free.leading),
        "torch": torch.__version__,
    }
    write_atomically(path, save(arrays, metadata))


def _packed(values: np.ndarray) -> np.ndarray:
    """Binary logarithms in half precision: good to one part in a hundred, in half the room."""
    with np.errstate(divide="ignore"):
        return np.log2(values).astype(np.float16)


def _unpacked(logarithms: np.ndarray) -> np.ndarray:
    return np.exp2(logarithms.astype(np.float32))


def _read(bundle: Bundle, kind: str, names: list[str], names_sum: str) -> Floors | None:
    """The floors stored with a bundle; None where there are none or they were measured on another capture.

    Raises ParityError for a file that is damaged.
    """
    path = bundle.path / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            wanted = {"format": _FORMAT, "taps_sha256": _taps_sum(bundle), f"{kind}_names": names_sum}
            if any(metadata.get(key) != value for key, value in wanted.items()):
                return None
            errors = dict(zip(names, _unpacked(file.get_tensor(kind)), strict=True))
            distances = _unpacked(file.get_tensor("upstream")).tolist() if kind == FREE else []
            upstream = dict(zip(names, distances, strict=False))
            ratios, count = _unpacked(file.get_tensor(f"{kind}_ratios")), int(metadata[f"{kind}_count"])
            variants, leading = tuple(json.loads(metadata["variants"])), json.loads(metadata["leading"])
            return Floors(variants, errors, ratios, count, upstream, leading)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ParityError(f"{path} is not a complete file of floors ({error}): remove or replace it") from None


def _taps_sum(bundle: Bundle) -> str:
    """What floors belong to: the capture."""
    with (bundle.path / "taps.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names_sum(taps: Mapping[str, Tap]) -> str:
    """The names of taps in the order of the table's rows: finer ones come from the reference, which may get others."""
    return hashlib.sha256("\n".join(taps).encode()).hexdigest()
