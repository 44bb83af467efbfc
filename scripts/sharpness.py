"""Add noise of a known size to one component at a time, and count how often it is found.

    python scripts/sharpness.py [FOLDER...] [--output FILE]

FOLDERs hold oracle bundles (by default oracles/). lance_mlx runs each once steered by the oracle's values and once
by itself; of every kind of component one tap after the other then gets noise of 1 to 100 of its own floors, rounded to
the tap's dtype and of that size after it, and is judged as `localize` judges the steered run and `check` the free one.
Exit status: 0 when half are found at 5 floors and all at 10, under bfloat16 all at 3; 1 otherwise.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tables import README, replace_between, table

from parity.bundle.reading import find_bundles, read_bundle
from parity.cli.errors import one_line_errors
from parity.lance.given import answered
from parity.lance.names import parse
from parity.lance.ports import MlxPort
from parity.localize.steering import steered
from parity.oracle.bounds import Bounds, bounds_of
from parity.oracle.floors import logits_of, run_free
from parity.oracle.floors_file import floors_of
from parity.oracle.oracle import FREE, LOCAL, Oracle
from parity.report.runner import limit_threads
from parity.report.terminal import progress_bar
from parity.tensors.metrics import compare
from parity.tensors.names import component_kind
from parity.tensors.recording import Recording, Tap
from parity.tensors.rounding import rounded

SIZES = (1, 2, 3, 5, 10, 30, 100)
TAPS = 3
"""Taps of each kind of component of a bundle, the first, the middle and the last."""


def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of bundles.", show_default="oracles/")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="File that holds the table.")] = README,
) -> None:
    """Measure, and write the table."""
    with one_line_errors():
        limit_threads()
        paths = find_bundles(folders or [Path("oracles")])
        trials: list[tuple[str, str, int, bool, str]] = []
        with progress_bar(len(paths), "bundle") as start:
            for path in paths:
                trials += _trials(path, start(path.name))
        rows = []
        for command in ("check", "localize"):
            for dtype in ("float32", "bfloat16"):
                own = [trial for trial in trials if trial[:2] == (command, dtype)]
                found = {size: [t[3] for t in own if t[2] == size] for size in SIZES}
                shares = [f"{np.mean(each):.1%}" if each else "–" for each in found.values()]
                rows.append((command, dtype, len(own) // len(SIZES), *shares))
        text = table(("command", "numerics", "taps", *(f"{size} floors" for size in SIZES)), rows)
        missed = sorted({f"{c}, {d}: {name} at {size} floors" for c, d, size, found, name in trials
                         if not found and size >= (3 if d == "bfloat16" else 10)})  # fmt: skip
        half = all(np.mean([t[3] for t in trials if t[1] == d and t[2] == 5]) >= 0.5
                   for d in {t[1] for t in trials})  # fmt: skip
        replace_between(output, "sharpness", text)
        print(text, end="")
        print("".join(f"missed: {line}\n" for line in missed), end="")
        raise typer.Exit(bool(missed) or not trials or not half)


def _trials(path: Path, tell: object) -> Iterator[tuple[str, str, int, bool, str]]:
    bundle = read_bundle(path)
    oracle = Oracle.of(bundle)
    floors = floors_of(oracle, tell)
    port = MlxPort(bundle)
    forced = steered(port, oracle).recording
    expected = bundle.expected | logits_of(run_free(oracle.run, bundle))
    free = port.run(set(expected), answered(bundle)).recording
    for command, held, bounds, got in (
        ("localize", oracle.own, bounds_of(floors[LOCAL], oracle.own, bundle.dtype), forced),
        ("check", expected, bounds_of(floors[FREE], expected, bundle.dtype), free),
    ):
        for name in _chosen(bounds, got):
            for size in SIZES:
                noisy = _noisy(held[name], got[name], size * bounds.floor(name), size)
                found = bounds.taps[name].exceeded_by(compare(held[name], noisy, parse(name).most))
                yield command, bundle.dtype, size, found, f"{bundle.name} {name}"


def _chosen(bounds: Bounds, got: Recording) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, bound in bounds.taps.items():
        if name in got and bound.floor and got[name].array.any():
            kinds.setdefault(component_kind(name), []).append(name)
    return [names[i] for names in kinds.values()
            for i in sorted({round(k * (len(names) - 1) / (TAPS - 1)) for k in range(TAPS)})]  # fmt: skip


def _noisy(held: Tap, tap: Tap, size: float, seed: int) -> Tap:
    """A tap with noise whose norm after rounding is `size` of what it is held against."""
    values = tap.array.astype(np.float64)
    noise = np.random.default_rng(seed).standard_normal(values.shape)
    wanted = size * np.linalg.norm(held.array.astype(np.float64))
    low, high = 0.0, 4 * wanted / np.linalg.norm(noise) + 2.0**-6 * np.abs(values).max()
    for _ in range(40):
        # Of a few elements that are rounded not every size can be had: the smallest that is no less.
        middle = (low + high) / 2
        array = rounded(values + middle * noise, tap.dtype)
        off = np.linalg.norm(array.astype(np.float64) - values)
        low, high = (middle, high) if off < wanted else (low, middle)
    return Tap(rounded(values + high * noise, tap.dtype), tap.dtype)


if __name__ == "__main__":
    typer.run(main)
