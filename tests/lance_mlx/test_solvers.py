"""Solvers: their order against a fine Euler run on a smooth flow, and what they leave as it is."""

import mlx.core as mx
import numpy as np
import pytest

from lance_mlx import FLOAT32, Request, Scheduler, Task, load
from lance_mlx.sampling.flow import advance
from lance_mlx.sampling.schedule import timesteps
from lance_mlx.sampling.solvers import make_solver


def field(x: mx.array, t: float) -> mx.array:
    """A smooth flow in which nothing is linear."""
    return mx.sin(2 * x + 3 * t) + x * mx.cos(mx.array(4 * t)) + 0.3


def run(scheduler: Scheduler, steps: int) -> np.ndarray:
    times = timesteps(steps, 1.0).astype(float).tolist()
    x, solve = mx.linspace(-2, 2, 192).reshape(4, 48), make_solver(scheduler, field, advance)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = advance(x, solve(field(x, t), x, t, t_next), t - t_next)
    return np.array(x)


@pytest.mark.parametrize(("scheduler", "order"), [("euler", 1), ("heun", 2), ("dpm++2m", 2)])
def test_the_error_falls_with_the_order_of_the_solver(scheduler, order):
    exact = 2 * run(Scheduler.EULER, 8000) - run(Scheduler.EULER, 4000)
    errors = [np.abs(run(Scheduler(scheduler), steps) - exact).mean() for steps in (20, 40, 80)]
    measured = [np.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
    assert measured == pytest.approx([order, order], abs=0.3)


@pytest.mark.parametrize("entry", ["kv_cache", "full_sequence"])
def test_a_solver_draws_something_else_and_leaves_given_latents(checkpoint, media, entry):
    model = load(checkpoint, "float32")
    given = {"visuals": (("phone.jpg", "image"),), "num_frames": 9, "num_steps": 4, "vae_resolution": 64}
    given["visuals"] = tuple({"path": str(media / name), "kind": kind} for name, kind in given["visuals"])
    made = {}
    for scheduler in Scheduler:
        values = {"task": "i2v", "prompt": "it moves", "entry": entry, "scheduler": str(scheduler)}
        made[scheduler] = model.generate(Request.from_dict(values | given | {"visuals": list(given["visuals"])}))
    latents = [np.array(generated.latents) for generated in made.values()]
    assert all(np.array_equal(latents[0][0], other[0]) for other in latents)
    assert len({other.tobytes() for other in latents}) == 3
    assert [generated.metadata.get("departures") for generated in made.values()] == [
        None,
        ["heun in place of Euler steps"],
        ["dpm++2m in place of Euler steps"],
    ]


def test_one_pass_a_step_but_for_heuns_two(checkpoint, monkeypatch):
    from lance_mlx.sampling import flow

    model, passes, original = load(checkpoint, FLOAT32), [], flow.velocities
    monkeypatch.setattr(flow, "velocities", lambda model, arms, state: passes.append(1) or original(model, arms, state))
    for scheduler, expected in (("euler", 5), ("heun", 9), ("dpm++2m", 5)):
        passes.clear()
        model.generate(Request(Task.T2I, "a bird", 32, 32, num_steps=5, scheduler=scheduler))
        assert len(passes) == expected
