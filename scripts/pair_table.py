"""Compare mlx-lm's models with transformers', as they are and broken, and say what other criteria would have said.

    python scripts/pair_table.py [--only PATTERN] [--seeds N] [--readme FILE]

Clean: every model and dtype with N seeds of weights. Broken: every fault in every model that it is put into. Beside the
verdict, what criteria say that hold every module's result against the trusted model's in one free run: correlation
below 0.99, cosine below 0.999, a value off by more than 1 % or 10 % of the largest, and in bfloat16 an error of more
than 1.2 times that of the trusted model against itself in float32. With --readme the tables are written there.
Exit status: 0 done, 2 a file cannot be used.
"""

import argparse
import copy
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from pair_faults import FAULTS, Fault
from pair_models import MODELS
from tables import replace_between, table

from parity.comparison.verdict import AGREE
from parity.pairs import Pair, localize_pair
from parity.pairs.mlx_side import MlxSide
from parity.pairs.names import parse
from parity.pairs.torch_side import TorchSide
from parity.report.runner import limit_threads
from parity.tensors.recording import Recording

SEEDS = 8
OURS, OF_BFLOAT16 = "lance-parity port", "1.2 times bfloat16's error"
Criterion = Callable[[np.ndarray, np.ndarray, np.ndarray | None], bool]
"""Whether it finds a result wrong: given what is expected, what was computed, and what float32 computes."""


def _correlation(x: np.ndarray, y: np.ndarray, wide: np.ndarray | None) -> bool:
    return x.size > 1 and not np.corrcoef(x.ravel(), y.ravel())[0, 1] >= 0.99


def _cosine(x: np.ndarray, y: np.ndarray, wide: np.ndarray | None) -> bool:
    return not np.vdot(x, y) >= 0.999 * np.linalg.norm(x) * np.linalg.norm(y)


def _largest(part: float) -> Criterion:
    return lambda x, y, wide: not np.abs(x - y).max() <= part * np.abs(x).max()


def _times_float32(x: np.ndarray, y: np.ndarray, wide: np.ndarray | None) -> bool:
    return wide is not None and not np.linalg.norm(y - wide) <= 1.2 * np.linalg.norm(x - wide)


CRITERIA: dict[str, Criterion] = {
    "correlation 0.99": _correlation,
    "cosine 0.999": _cosine,
    "1 % of the largest": _largest(0.01),
    "10 % of the largest": _largest(0.1),
    OF_BFLOAT16: _times_float32,
}
# Departures of mlx-lm's own code that were looked at: configurations name another activation than it computes.
FINDS = ("starcoder2", "gpt_neox")


@dataclass(frozen=True)
class Trial:
    """One run: what each criterion found first (None: nothing), and what ours explains it with."""

    model: str
    dtype: str
    fault: Fault | None
    found: dict[str, str | None]
    cause: str = ""
    certain: bool = False
    seconds: float = 0.0

    @property
    def named(self) -> bool:
        """Whether the cause that ours tells is what was broken."""
        return self.fault is not None and bool(self.cause and re.search(self.fault.says, self.cause))

    def right(self, criterion: str) -> bool:
        """Whether what a criterion found first is the part that is broken, or what reads or holds it."""
        first = self.found[criterion]
        if first is None or self.fault is None:
            return False
        # Criteria that look at modules alone are right where they name the one that the function is in.
        if criterion != OURS:
            first = re.sub(r"\.o_proj$", ".sdpa", first)
            return bool(re.search(re.sub(r" \\\(.*|\$$", "", self.fault.component), first)) or (
                "down_proj" in self.fault.component and first.endswith("mlp.down_proj"))  # fmt: skip
        return bool(re.search(self.fault.component, first))


def trial(model: str, dtype: str, fault: Fault | None, seed: int = 0) -> Trial:
    """Run a pair, broken or as it is."""
    pair, started = MODELS[model].pair(dtype, seed), time.perf_counter()
    with fault.breaks(pair.port, MODELS[model].ported()) if fault else nullcontext():
        result = localize_pair(pair, model)
        seconds = time.perf_counter() - started
        others = _others(pair, dtype)
    first = result.first
    ours = None if result.verdict == AGREE else first.component if first else "nothing could be said"
    cause = first.explanations[0].name if first and first.explained else ""
    return Trial(model, dtype, fault, {OURS: ours, **others}, cause, bool(first and first.certain), seconds)


def _others(pair: Pair, dtype: str) -> dict[str, str | None]:
    trusted = TorchSide().run(pair)
    own, got = trusted.taps, MlxSide(pair, trusted, {}).run().taps
    wide = TorchSide().run(pair, copy.deepcopy(pair.trusted).float()).taps if dtype == "bfloat16" else {}
    return {name: _first(criterion, own, got, wide) for name, criterion in CRITERIA.items()}


def _first(criterion: Criterion, own: Recording, got: Recording, wide: Recording) -> str | None:
    for name, tap in own.items():
        if ":" in name or ".sdpa" in name or name not in got or got[name].shape != tap.shape:
            continue
        x, y = (each.array.astype(np.float64) for each in (tap, got[name]))
        if criterion(x, y, wide[name].array.astype(np.float64) if name in wide else None):
            return parse(name).component
    return None


def trials(only: str, seeds: int) -> Iterator[Trial]:
    """All trials whose model or fault matches a pattern."""
    for name, model in MODELS.items():
        for dtype in model.dtypes:
            for seed in range(seeds) if fnmatchcase(name, only) else ():
                yield trial(name, dtype, None, seed)
    for fault in FAULTS:
        for name in fault.models if fnmatchcase(fault.name, only) else ():
            for dtype in MODELS[name].dtypes:
                yield trial(name, dtype, fault)


def summary(done: list[Trial]) -> str:
    """The tables in Markdown."""
    broken = [t for t in done if t.fault]
    finds = [t for t in done if not t.fault and t.dtype == "float32" and t.model in FINDS]
    clean = [t for t in done if not t.fault and t not in finds]
    rows = []
    for criterion in (OURS, *CRITERIA):
        tried, whole = (
            [t for t in trials if criterion != OF_BFLOAT16 or t.dtype == "bfloat16"] for trials in (broken, clean)
        )
        rows.append([
            criterion,
            _of(sum(t.found[criterion] is not None for t in tried), len(tried)),
            _of(sum(t.right(criterion) for t in tried), len(tried)),
            _of(sum(t.named for t in tried), len(tried)) if criterion == OURS else "–",
            _of(sum(t.found[criterion] is not None for t in whole), len(whole)),
        ])  # fmt: skip
    lines = [table(["criterion", "found", "first part right", "cause right", "called wrong as they are"], rows)]
    lines.append(f"Told with confidence and not what was broken: {sum(t.certain and not t.named for t in broken)}.")
    slowest = max((t.seconds for t in done), default=0.0)
    lines.append(f"{len(clean)} runs as they are, {len(broken)} broken; the slowest took {slowest:.1f} s. Not named:\n")
    for t in broken:
        if not (t.right(OURS) and t.named):
            found = t.found[OURS] or "not found"
            lines.append(f"- {t.fault.name} in {t.model}, {t.dtype}: {found}: {t.cause or 'none'}")
    lines.append("\nWhat mlx-lm's own code computes otherwise than the configuration says, in float32:\n")
    for model, said in {t.model: f"{t.found[OURS]}: {t.cause}" for t in finds}.items():
        lines.append(f"- {model}: {said}")
    return "\n".join(lines)


def _of(count: int, of: int) -> str:
    return f"{count} of {of} ({count / of:.0%})" if of else "–"


def main() -> int:
    """Run the trials and print or write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models and faults by name (fnmatch)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="weights of each clean pair")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="a Markdown file with a place for the tables")
    options = parser.parse_args()
    limit_threads()
    done = []
    for one in trials(options.only, options.seeds):
        done.append(one)
        what = one.fault.name if one.fault else "as it is"
        print(f"{one.model} {one.dtype}, {what}: {one.found[OURS]}: {one.cause}", file=sys.stderr, flush=True)
    text = summary(done)
    print(text)
    if options.readme:
        replace_between(options.readme, "pairs", f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
