"""Measure the order of every solver, and put the table into docs/generating.md.

    python scripts/solver_orders.py [--model DIR] [--output FILE.md]

The order is how many times the error halves when the steps are doubled; the error is the mean distance of the latents
to those of fine Euler runs, extrapolated to steps of no length. It is measured on a smooth flow in which nothing is
linear, and on a model's own: random weights at a small width, float32, 32x32 pixels, guided, in equal steps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import numpy as np
import typer
from tables import replace_between, table

from lance_mlx import LanceModel, Request, Scheduler, Task, load
from lance_mlx.sampling.flow import advance
from lance_mlx.sampling.solvers import make_solver

ROOT = Path(__file__).parents[1]
FINE = 4000
STEPS, MODEL_STEPS = (20, 40, 80), (4, 8, 16)
WHOLE, INSIDE = (1.0, 0.0), (0.9, 0.2)
PASSES = dict.fromkeys(Scheduler, "1") | {Scheduler.HEUN: "2"}

Run = Callable[[Scheduler, int], np.ndarray]
"""The latents that a solver reaches in so many steps."""


def smooth(x: mx.array, t: float) -> mx.array:
    """The velocity of a smooth flow in which nothing is linear."""
    return mx.sin(2 * x + 3 * t) + x * mx.cos(mx.array(4 * t)) + 0.3


def run_smooth(start: float, end: float) -> Run:
    """Runs along the smooth flow between two times in equal steps."""

    def run(scheduler: Scheduler, steps: int) -> np.ndarray:
        times = np.linspace(start, end, steps + 1).tolist()
        x, solve = mx.linspace(-2, 2, 192).reshape(4, 48), make_solver(scheduler, smooth, advance)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = advance(x, solve(smooth(x, t), x, t, t_next), t - t_next)
        return np.array(x)

    return run


def run_model(model: LanceModel, low: float) -> Run:
    """Runs of a model from its noise in equal steps, guided while low < t."""

    def run(scheduler: Scheduler, steps: int) -> np.ndarray:
        sampling = {"num_steps": steps, "timestep_shift": 1.0, "guidance_interval": (low, 1.0)}
        request = Request(Task.T2I, "a red bird", 32, 32, scheduler=scheduler, **sampling)
        return np.array(model.generate(request).latents)

    return run


def limit(run: Run, fine: int) -> np.ndarray:
    """Where Euler steps of no length lead: the error of fine ones that halves with them is taken off."""
    return 2 * run(Scheduler.EULER, fine) - run(Scheduler.EULER, fine // 2)


def errors(run: Run, scheduler: Scheduler, steps: Sequence[int], exact: np.ndarray) -> list[float]:
    """Mean distance to `exact` after each number of steps."""
    return [float(np.abs(run(scheduler, count) - exact).mean()) for count in steps]


def orders(found: Sequence[float]) -> list[float]:
    """How many times the error halves from each number of steps to its double."""
    return [float(np.log2(coarse / fine)) for coarse, fine in zip(found[:-1], found[1:], strict=True)]


def main(
    model: Annotated[Path, typer.Option(help="A small checkpoint.")] = ROOT / "oracles" / "checkpoint-a",
    output: Annotated[Path, typer.Option(help="A Markdown file with a place for the table.")] = (
        ROOT / "docs" / "generating.md"
    ),
    fine: Annotated[int, typer.Option(help="Euler steps of the model's fine run.")] = 512,
) -> None:
    """Measure the order of every solver."""
    loaded = load(model, "float32")
    runs = [run_smooth(*INSIDE), run_smooth(*WHOLE), run_model(loaded, 0.0), run_model(loaded, 0.4)]
    exact = [limit(run, count) for run, count in zip(runs, (FINE, FINE, fine, fine), strict=True)]
    rows = []
    for scheduler in Scheduler:
        found = [
            errors(run, scheduler, steps, where)
            for run, steps, where in zip(runs, (STEPS, STEPS, MODEL_STEPS, MODEL_STEPS), exact, strict=True)
        ]
        last = [f"{orders(each)[-1]:.1f}" for each in found[:3]]
        rows.append([f"`{scheduler}`", PASSES[scheduler], *last, *(f"{each[-1]:.4f}" for each in found[2:])])
    inside = f"order from t = {INSIDE[0]} to {INSIDE[1]}"
    heads = ["solver", "passes a step", inside, "order from 1 to 0", "order on the model"]
    heads += [f"error of {MODEL_STEPS[-1]} steps", "the same, guided while t > 0.4"]
    replace_between(output, "solvers", table(heads, rows))


if __name__ == "__main__":
    typer.run(main)
