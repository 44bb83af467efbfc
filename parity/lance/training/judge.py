"""Whether a run of training agrees with its bundle: by how far equally right runs of the reference are apart."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median

import numpy as np

from parity.lance.training.bundle import GRADIENT, TrainingBundle
from parity.lance.training.run import TrainingRun
from parity.lance.training.torch_side import TorchTraining, disturbed_weights, variants_of

FACTOR = 4.0
"""How many times as far as the farthest equally right run a run may be: it is one of few that were measured."""
_DRAWS = (1, 2, 3)
_FLAT = 32
"""A gradient counts for the sign that a step takes where it is so many times as large as what rounding does to it."""


def expected(bundle: TrainingBundle) -> TrainingRun:
    """What a bundle holds, as a run."""
    held = [{name: tap.array for name, tap in part.items()} for part in (bundle.outputs, bundle.gradients)]
    deltas = {name: tap.array for name, tap in bundle.deltas.items()}
    exact = {name: tap.array for name, tap in bundle.inputs.items()}
    return TrainingRun(exact, *held, np.ones(exact["text_ids"].shape, bool), deltas)


def floors_of(bundle: TrainingBundle) -> dict[str, float]:
    """How far equally right runs are from each other: the error of each tap, gradient and delta by its name, at least
    the median of all of its kind; and of what a step changes at least what rounding its parameter does to that."""
    whole = TorchTraining(bundle).run()
    whole = replace(whole, deltas={name: whole.deltas[name] for name in bundle.deltas})
    runs = list(_variants(bundle))
    found: dict[str, float] = {}
    for run in runs:
        for name, error in _errors(whole, run).items():
            found[name] = max(found.get(name, 0.0), error)
    kinds = {name: [error for other, error in found.items() if _kind(other) == _kind(name) and error] for name in found}
    floors = {name: max(error, median(kinds[name] or [0.0])) for name, error in found.items()}
    parameters = bundle.unrounded()
    # The squares of a tensor, added up one by one.
    largest = max(array.size for array in parameters.values())
    floors["total_norm"] = max(floors["total_norm"], 2.0**-24 * largest**0.5)
    for name, delta in whole.deltas.items():
        length = float(np.linalg.norm(parameters[name.partition("/")[2]]))
        floors[name] = 2.0**-24 * length / float(np.linalg.norm(delta) or 1)
    for run in runs:
        for name, error in _delta_errors(whole, run, floors):
            floors[name] = max(floors[name], error)
    return floors


def errors_of(bundle: TrainingBundle, run: TrainingRun, floors: Mapping[str, float]) -> dict[str, float]:
    """How far a run is from its bundle, each tap, gradient and delta relative to the bundle's length.

    Deltas are looked at where the gradient has a sign that rounding cannot turn: the optimizer's eps is so small that a
    step moves every parameter by the learning rate, however small its gradient is.
    """
    right = expected(bundle)
    return _errors(right, run) | dict(_delta_errors(right, run, floors))


def beyond(errors: Mapping[str, float], floors: Mapping[str, float]) -> dict[str, float]:
    """What is farther than FACTOR times its floor, and by how many floors."""
    far = {name: error for name, error in errors.items() if error > FACTOR * floors[name]}
    return {name: error / floors[name] if floors[name] else np.inf for name, error in far.items()}


def inexact(bundle: TrainingBundle, run: TrainingRun, ulps: int = 4) -> list[str]:
    """The names of integers that are not equal, and of times and states that are farther than some units in the last
    place of the largest value."""
    wrong = []
    for name, ours in run.exact.items():
        if name == "mask":
            wrong += [name] if not np.array_equal(ours, mask_of(bundle)) else []
            continue
        tap = bundle.inputs[name]
        same = ours.shape == tap.shape
        if same and ours.dtype.kind == "f":
            most = ulps * 2.0**-24 * np.abs(tap.array).max() if tap.dtype == "float32" else 0.0
            same = bool(np.abs(ours - tap.array).max() <= most)
        elif same:
            same = np.array_equal(ours, tap.array)
        wrong += [] if same else [name]
    return wrong


def mask_of(bundle: TrainingBundle) -> np.ndarray:
    """Which key each query sees, bool [L, L], from a bundle's splits and samples, row by row as they are meant."""
    lengths, modes = (bundle.inputs[name].array.tolist() for name in ("split_lens", "attn_modes"))
    rows = len(bundle.inputs["text_ids"].array)
    split = np.repeat(np.arange(len(lengths)), lengths)[:rows]
    sample = np.repeat(np.arange(len(bundle.inputs["sample_lens"].array)), bundle.inputs["sample_lens"].array)[:rows]
    seen = np.zeros((rows, rows), bool)
    for query in range(rows):
        for key in range(rows):
            own = split[query] == split[key]
            noise = modes[split[key]] == 3
            before = key <= query or own and modes[split[query]] != 0
            seen[query, key] = sample[query] == sample[key] and before and (own or not noise)
    return seen


def _variants(bundle: TrainingBundle) -> Iterator[TrainingRun]:
    for numerics in variants_of(bundle.dtype).values():
        yield TorchTraining(bundle, numerics).run()
    # Weights that are bfloat16 are not rounded once more.
    for seed in _DRAWS if bundle.dtype == "float32" else ():
        side = TorchTraining(bundle)
        disturbed_weights(side, seed)
        yield side.run()


def _errors(right: TrainingRun, run: TrainingRun) -> dict[str, float]:
    found = {name: _error(right.gradients[name], array) for name, array in run.gradients.items()}
    for name, array in run.outputs.items():
        if name in right.outputs:
            held = right.outputs[name]
            # A run may leave out rows that nothing is learned from.
            fewer = held.ndim and len(held) == len(run.rows) and array.shape != held.shape
            found[name] = _error(held[run.rows] if fewer else held, array)
    return found


def _delta_errors(right: TrainingRun, run: TrainingRun, floors: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for name, held in right.deltas.items():
        if name not in run.deltas:
            continue
        gradient = right.gradients[name.partition("/")[2]]
        size = np.sqrt(np.mean(np.square(gradient, dtype=np.float64)))
        clear = np.abs(gradient) > _FLAT * floors[name.partition("/")[2]] * size
        yield name, _error(held[clear], run.deltas[name][clear])


def _error(right: np.ndarray, ours: np.ndarray) -> float:
    right, ours = (np.asarray(array, np.float64) for array in (right, ours))
    if right.reshape(-1).shape != ours.reshape(-1).shape:
        return float("inf")
    error, size = (float(np.linalg.norm(array.reshape(-1))) for array in (ours.reshape(-1) - right.reshape(-1), right))
    return error / size if size else error


def _kind(name: str) -> str:
    if name.startswith(GRADIENT):
        return GRADIENT
    return "parameters" if name.endswith((".weight", ".bias")) else "taps"
