"""One measurement of sensitivity, with its files: what was measured, the page, the recipe."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save

from parity.errors import ParityError
from parity.files import write_atomically
from parity.lance.sensitivity.cases import read_inputs
from parity.lance.sensitivity.measure import Session, Tell
from parity.lance.sensitivity.measured import Measured, Plan
from parity.lance.sensitivity.page import page_of
from parity.report.output import require_own_page

KEPT, PAGE, RECIPE, SCALES = "measured.json", "index.html", "recipe.json", "scales.safetensors"


def measure(
    paths: Sequence[Path],
    out: Path,
    tell: Tell,
    model: Path | None = None,
    numerics: str | None = None,
    widths: Sequence[int] = (4, 6, 8),
    bands: int = 4,
    group_size: int = 64,
    budget: str | None = None,
    calibrate: bool = False,
) -> Measured:
    """Measure what quantizing each group of weights does to runs, and write `out`/index.html, and the recipe of a
    budget.

    What is measured is kept in `out`/measured.json as it comes, from where another call goes on.

    Args:
        paths: bundles, and JSON files of requests; see read_inputs.
        model: the checkpoint in any layout; that of the bundles where None.
        widths: bits, of 3, 4, 5, 6 and 8.
        bands: of layers that are told apart.
        budget: such as 7.5GB for all files, or 5.2bits a weight.
        calibrate: search for scales, and keep them in the recipe where runs are nearer behind them.

    Raises:
        ParityError: an input, an option or the folder cannot be used.
    """
    known = {3, 4, 5, 6, 8}
    if not widths or set(widths) - known:
        raise ParityError(f"bits {', '.join(map(str, widths))} must be of {', '.join(map(str, sorted(known)))}")
    if bands < 1 or group_size not in (32, 64, 128):
        raise ParityError("there must be a band of layers at least, and groups of 32, 64 or 128 weights")
    if out.exists() and not out.is_dir():
        raise ParityError(f"{out} is no folder: name another one with --out")
    require_own_page(out / PAGE)
    for name in (RECIPE, SCALES):
        if (out / name).exists() and not (out / KEPT).exists():
            raise ParityError(f"{out / name} is not of this command: name another folder with --out")
    plan = Plan(read_inputs(paths, model, numerics), tuple(sorted(set(widths))), bands, group_size)
    session = Session(plan, out / KEPT, tell)
    measured = session.run(budget, calibrate)
    if measured.solved:
        recipe = measured.solved.recipe
        if scales := session.scales_of(measured.solved.scaled):
            write_atomically(out / SCALES, save(scales))
            recipe = {"scales": SCALES} | recipe
        write_atomically(out / RECIPE, json.dumps(recipe, indent=1).encode())
    write_atomically(out / PAGE, page_of(measured).encode())
    return measured
