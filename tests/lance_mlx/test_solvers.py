"""Solvers: their order against a fine Euler run, on a smooth flow and on the model's, and what they leave as it is."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lance_mlx import FLOAT32, Request, Scheduler, Task, load

SCRIPTS = Path(__file__).parents[2] / "scripts"
ORDERS = {"euler": 1, "heun": 2, "dpm++2m": 2, "unipc": 2}


@pytest.fixture(scope="module")
def measuring() -> SimpleNamespace:
    """What `scripts/solver_orders.py` measures with."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "solver_orders.py")))
    finally:
        sys.path.pop(0)


def test_the_error_falls_with_the_order_of_the_solver(measuring):
    assert set(ORDERS) == set(Scheduler)
    # The corrector adds one to UniPC's, where the logarithm of the signal-to-noise ratio stays finite.
    for span, expected in ((measuring.INSIDE, ORDERS | {"unipc": 3}), (measuring.WHOLE, ORDERS)):
        run = measuring.run_smooth(*span)
        exact = measuring.limit(run, measuring.FINE)
        for name, order in expected.items():
            found = measuring.orders(measuring.errors(run, Scheduler(name), measuring.STEPS, exact))
            at_most = order + (1 if span is measuring.WHOLE and name == "unipc" else 0.3)
            assert all(order - 0.3 < each < at_most for each in found), (span, name, found)


def test_it_falls_so_on_the_models_own_flow(measuring, checkpoint):
    run = measuring.run_model(load(checkpoint, FLOAT32), 0.0)
    exact = measuring.limit(run, 128)
    for name, order in ORDERS.items():
        found = measuring.errors(run, Scheduler(name), measuring.MODEL_STEPS, exact)
        # Twice as many steps are at most as many as the order promises for an error so much smaller.
        assert min(measuring.orders(found)) > order - 0.2, (name, found)


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
    assert len({other.tobytes() for other in latents}) == 4
    assert [generated.metadata.get("departures") for generated in made.values()] == [
        None,
        ["heun in place of Euler steps"],
        ["dpm++2m in place of Euler steps"],
        ["unipc in place of Euler steps"],
    ]


def test_one_pass_a_step_but_for_heuns_two(checkpoint, monkeypatch):
    from lance_mlx.sampling import flow

    model, passes, original = load(checkpoint, FLOAT32), [], flow.velocities
    monkeypatch.setattr(flow, "velocities", lambda model, arms, state: passes.append(1) or original(model, arms, state))
    for scheduler, expected in (("euler", 5), ("heun", 9), ("dpm++2m", 5), ("unipc", 5)):
        passes.clear()
        model.generate(Request(Task.T2I, "a bird", 32, 32, num_steps=5, scheduler=scheduler))
        assert len(passes) == expected
