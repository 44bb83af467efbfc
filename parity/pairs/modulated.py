"""Results of a pair's trusted model that are others times a factor for each channel, plus an offset."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
from torch import nn

from parity.laws.modulation import factors, normed, product
from parity.laws.numbers import ordinal
from parity.pairs.known import NEAR, Known, held, module_at
from parity.pairs.names import distance, parse, relative
from parity.pairs.sides import IN
from parity.pairs.torch_side import TorchSide
from parity.tensors.metrics import rel_l2

# The nearest results that may be terms, the most terms, and the most vectors that may be factors.
RECENT, TERMS, VECTORS = 8, 3, 96
# Chunks of one result that are told apart at most; tokens and channels that terms are looked for in.
CHUNKS, TOKENS, CHANNELS = 12, 64, 32
# The least part of a result that a term is believed to make.
LEAST = 1e-4

Lay = Callable[[np.ndarray], np.ndarray | None]


def modulated(model: nn.Module, side: TorchSide, name: str, among: Sequence[str]) -> Known | None:
    """A modulation, a gated sum or a layer scale at a tap, of some of the taps before it."""
    for lay in _layouts(side.taps[name].array):
        found = _made_of(side, name, lay, among)
        if found is None:
            continue
        terms, inputs = found
        inputs = {**_others(side, name, lay, among), **inputs}
        facts = {"terms": terms, "vectors": dict(_vectors(model, side, name, lay(side.taps[name].array)))}
        if len(terms) == 1 and (norm := _norm(model, side, name, lay, terms[0], among)):
            facts["norm"], more = norm
            inputs = {**more, **inputs}
        return Known("modulated", inputs, facts, lay, ("batch", "token", "channel"))
    return None


def _layouts(own: np.ndarray) -> Iterator[Lay]:
    """Ways to have arrays that are laid out as one, or with its channels last, as [batch, tokens, channels]."""
    if own.ndim == 3:
        yield lambda array: array if array.shape == own.shape else None
    for first in (True, False) if own.ndim == 4 else ():
        last = np.moveaxis(own, 1, -1).shape if first else own.shape
        rows = (last[0], last[1] * last[2], last[3])

        def lay(array: np.ndarray, first: bool = first, last=last, rows=rows) -> np.ndarray | None:
            if array.shape == own.shape:
                return (np.moveaxis(array, 1, -1) if first else array).reshape(rows)
            return array.reshape(rows) if array.shape in (last, rows) else None

        yield lay


def _made_of(side: TorchSide, name: str, lay: Lay, among: Sequence[str]) -> tuple[tuple, dict[str, np.ndarray]] | None:
    """The terms of a tap, and they and what else may be one by name."""
    own = lay(side.taps[name].array)
    some, near = _some(own.shape), NEAR[side.taps[name].dtype]
    inside = np.ix_(range(len(own)), *some)
    found = _recent(side, name, lay, among)
    for count in range(1, TERMS + 1):
        if some[0].size < 2 * count + 4:
            break
        for terms in combinations(found, count):
            if _fits([found[term][inside] for term in terms], own[inside], near):
                arrays = [found[term] for term in terms]
                if _fits(arrays, own, near):
                    inputs = dict(zip((relative(term, name) for term in terms), arrays, strict=True))
                    return tuple(inputs), inputs
    return None


def _some(shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return tuple(np.sort(random.permutation(n)[:most]) for n, most in zip(shape[1:], (TOKENS, CHANNELS), strict=True))


def _fits(terms: Sequence[np.ndarray], own: np.ndarray, near: float) -> bool:
    by = factors(terms, own)
    error = rel_l2(own, product(terms, by).astype(np.float32))
    if error is None or error > near:
        return False
    # A term that is no part of it, and what an offset alone is near to, tell nothing.
    shares = [np.linalg.norm(term * factor[:, None]) for term, factor in zip(terms, by, strict=False)]
    return min(shares) > max(10 * error, LEAST) * np.linalg.norm(own)


def _recent(side: TorchSide, name: str, lay: Lay, among: Sequence[str]) -> dict[str, np.ndarray]:
    """The nearest results of a tap's shape, each value once, by the nearest of its names."""
    found: dict[str, np.ndarray] = {}
    for other in sorted(among, key=lambda other: distance(other, name)):
        array = lay(side.taps[other].array)
        if array is None or array.dtype.kind != "f" or any(np.array_equal(there, array) for there in found.values()):
            continue
        found[other] = array
        if len(found) == RECENT:
            break
    return found


def _others(side: TorchSide, name: str, lay: Lay, among: Sequence[str]) -> dict[str, np.ndarray]:
    """What may stand in the place of a term, by name."""
    return {relative(other, name): array for other, array in _recent(side, name, lay, among).items()}


def _vectors(model: nn.Module, side: TorchSide, name: str, own: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What a tap's channels may be multiplied by, [batch, channels]: chunks of results, parameters, sums of the two."""
    batch, _, channels = own.shape
    call = parse(name).call
    before = [other for other in side.taps if parse(other).call == call and IN not in other]
    before = before[: before.index(name)] if name in before else before
    chunks: dict[str, np.ndarray] = {}
    for other in sorted(before, key=lambda other: distance(other, name)):
        array = side.taps[other].array
        flat = array.size and array.size % (batch * channels) == 0 and array.shape[0] == batch
        count = array.size // (batch * channels) if flat else 0
        # One for each token is none for each channel.
        if not 0 < count <= CHUNKS or array.ndim not in (2, 3) or array.ndim == 3 and array.shape[1] not in (1, count):
            continue
        if array.ndim == 3 and array.shape[1] != 1 and array.shape == own.shape:
            continue
        said = relative(other, name)
        for i, chunk in enumerate(np.moveaxis(array.reshape(batch, count, channels), 1, 0)):
            chunks.setdefault(said if count == 1 else f"chunk {i} of {count} of {said}", chunk)
        for i in range(count if count > 1 else 0):
            chunks.setdefault(
                f"each {ordinal(count)} channel of {said} from {i} on", array.reshape(batch, -1)[:, i::count]
            )
        if len(chunks) > VECTORS:
            break
    yield from chunks.items()
    for said, rows in _parameters(model, name, channels):
        for i, row in enumerate(rows):
            one = said if len(rows) == 1 else f"row {i} of {said}"
            yield one, np.broadcast_to(row, (batch, channels))
            for j in range(len(rows)) if len(rows) > 1 else ():
                for chunk in (key for key in chunks if key.startswith(f"chunk {j} of {len(rows)} ")):
                    yield f"{one} plus {chunk}", row + chunks[chunk]


def _parameters(model: nn.Module, name: str, channels: int) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters [n, channels] of the modules that hold a tap, which no module of a library's is made of."""
    path = parse(name).path.partition(":")[0].partition("#")[0].split(".")
    for depth in range(len(path), max(len(path) - 3, -1), -1):
        try:
            module = model.get_submodule(".".join(path[:depth]))
        except AttributeError:
            continue
        for said, parameter in module.named_parameters():
            inside = module.get_submodule(said.rpartition(".")[0])
            size = parameter.numel()
            if size % channels == 0 and 0 < size // channels <= CHUNKS and not hasattr(inside, "in_features"):
                if parameter.squeeze().ndim <= 2 and parameter.squeeze().shape[-1:] == (channels,):
                    yield said, held(parameter).reshape(-1, channels)


def _norm(
    model: nn.Module, side: TorchSide, name: str, lay: Lay, term: str, among: Sequence[str]
) -> tuple[dict, dict] | None:
    """Where a term is a layer norm: its eps and what its input is made of; and those by name."""
    call = parse(name).call
    base = next((other for other in side.taps if relative(other, name) == term and parse(other).call == call), "")
    module, given = module_at(model, base), side.taps.get(f"{base}{IN}")
    x, eps = None if given is None else lay(given.array), getattr(module, "eps", None)
    if x is None or not isinstance(eps, float):
        return None
    error = rel_l2(lay(side.taps[base].array), normed(x, eps).astype(np.float32))
    if error is None or error > NEAR[side.taps[name].dtype]:
        return None
    # What is normed may be made of what the port does not tell.
    below, names = f"{base}{IN}", list(side.taps)
    before = [other for other in names[: names.index(below)] if parse(other).call == call]
    ways = (_made_of(side, below, lay, telling) for telling in ([o for o in before if o in among], before))
    terms, inputs = next(filter(None, ways), ((), {}))
    return {"eps": eps, "terms": terms}, {**inputs, "x": x}
