"""Scales found on what goes through the towers: what is searched, that recipes carry them, and whether they win."""

import json
from pathlib import Path

import make_checkpoint
import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from lance_mlx.checkpoint.folding import FOLLOWERS, followers
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.pipeline import load
from lance_mlx.requests.request import Variant
from parity.errors import ParityError
from parity.lance.sensitivity import calibrate, measure
from parity.lance.sensitivity.calibrate import _Rows, best_scales, recorded
from parity.lance.sensitivity.cases import read_inputs, run
from parity.lance.sensitivity.command import measure as command
from parity.lance.sensitivity.groups import as_quantized
from parity.lance.sensitivity.measure import Session
from parity.lance.sensitivity.measured import Plan

PLANTED = (1, 3)
WIDTHS = (4, 8)
LAYERS = "language_model.model.layers"


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done < total


def requests(path: Path, *prompts: str) -> Path:
    drawn = {"task": "t2i", "height": 32, "width": 48, "num_steps": 2}
    path.write_text(json.dumps([drawn | {"prompt": prompt, "seed": len(prompt)} for prompt in prompts]))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "checkpoint"
    layers = ",".join(map(str, PLANTED))
    assert make_checkpoint.main([str(folder), "--layers", "4", "--variant", "image", "--planted", layers]) == 0
    return folder


@pytest.fixture(scope="module")
def measured(planted, tmp_path_factory):
    """Measured layer by layer with scales and solved; the folder has what the command writes."""
    folder = tmp_path_factory.mktemp("out")
    given = [requests(folder / "r.json", "a red bird")]
    how = {"numerics": "float32", "widths": WIDTHS, "bands": 4, "group_size": 32, "calibrate": True}
    return command(given, folder / "found", quiet, planted, budget="5.5bits", **how), folder / "found"


@pytest.mark.exhaustive
def test_scales_win_on_other_requests_where_outliers_are_planted(measured, planted, tmp_path):
    found, folder = measured
    widths = {group.name: 4 for group in found.groups if group.name not in found.unread}
    winners = found.winners(widths)
    planted_groups = {g.name for g in found.groups if g.layers and g.layers[0] in PLANTED and g.kind != "o"}
    assert planted_groups - set(found.unread) <= winners
    unseen = requests(tmp_path / "r.json", "a green house", "the sea at night", "a cat")
    other = Session(Plan(read_inputs([unseen], planted, "float32"), WIDTHS, 4, 32), tmp_path / "measured.json", quiet)
    other._total = 10
    other._scales = load_file(folder / "calibration.safetensors")
    plain, scaled = other.effects(widths), other.effects(widths, winners)
    assert all(mine.cost**0.5 <= 0.5 * even.cost**0.5 for mine, even in zip(scaled, plain, strict=True))


def test_only_what_wins_is_kept(measured):
    found, folder = measured
    kept, every = (load_file(folder / f"{name}.safetensors") for name in ("scales", "calibration"))
    assert set(kept) < set(every) and found.solved.scaled
    for group in found.groups:
        bits = found.solved.bits[found.groups.index(group)]
        sources = [source for source in every if group.shapes.keys() >= set(followers(source))]
        assert all((source in kept) == (bits < 16 and found.wins(group, bits)) for source in sources)
        if group.name in found.solved.scaled:
            costs = [sum(each.cost for each in by[group.name, bits]) for by in (found.scaled, found.single)]
            assert costs[0] < 0.9 * costs[1]
    assert found.even_scaled[4][0].cost < found.even[4][0].cost


def test_a_converted_recipe_runs_as_it_was_measured(measured, planted):
    found, folder = measured
    recipe = Recipe.from_file(folder / "recipe.json")
    assert recipe.scales == folder / "scales.safetensors"
    case = found.plan.inputs.cases[0]
    packed = load(planted, Variant.IMAGE, measure.policy("float32"), recipe=recipe)
    plain = load(planted, Variant.IMAGE, measure.policy("float32"))
    schemes = {path: how for group, bits in zip(found.groups, found.solved.bits, strict=True)
               for path, how in group.schemes(bits, 32).items()}  # fmt: skip
    scales = {path: each for source, each in load_file(recipe.scales).items() for path in followers(source)}
    with as_quantized(plain.model, schemes, scales):
        assert np.array_equal(run(case, plain).latents, run(case, packed).latents)
    assert "scaled" in (folder / "index.html").read_text()


def test_scales_are_kept_and_are_of_their_runs(measured, planted, monkeypatch, tmp_path):
    found, folder = measured
    monkeypatch.setattr(measure, "calibrated", lambda *given: pytest.fail("this was searched"))
    again = Session(found.plan, folder / "measured.json", quiet)
    assert again.run("5.5bits", calibrate=True).to_json() == found.to_json()
    (tmp_path / "calibration.safetensors").write_bytes((folder / "scales.safetensors").read_bytes())
    with pytest.raises(ParityError, match="calibration.safetensors holds no scales of these runs"):
        Session(found.plan, tmp_path / "measured.json", quiet).run(None, calibrate=True)


# The search.


def test_every_tower_is_given_rows(planted, tmp_path):
    pipeline = load(planted, Variant.IMAGE, measure.policy("bfloat16"))
    (case,) = read_inputs([requests(tmp_path / "r.json", "a bird")], planted, "bfloat16").cases
    with recorded(pipeline.model) as kept:
        run(case, pipeline)
    assert kept.keys() == {f"{LAYERS}.{layer}.{source}" for layer in range(4) for source in FOLLOWERS}
    assert kept[f"{LAYERS}.0.mlp_moe_gen.up_proj"].array.shape[1] == 96


def test_rows_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(calibrate, "ROWS", 4)
    rows, count = _Rows(), 0
    for length in (3, 1, 7, 2, 30, 1, 1, 5):
        rows.add(mx.arange(count, count + length)[:, None])
        count += length
    found = rows.array[:, 0].tolist()
    assert found == list(range(0, count, 8)) and 4 <= len(found) <= 8


def test_scales_follow_large_channels_and_are_powers_of_two():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((64, 64)), rng.standard_normal((32, 64))
    x[:, 5] *= 64
    found = best_scales(mx.array(x, mx.float32), [mx.array(weight, mx.float32)], 32)
    assert set(np.log2(found) % 1) == {0.0} and found.argmax() == 5 and found[5] > 2
    # What is given alike needs none.
    alike = np.sign(x)
    assert best_scales(mx.array(alike, mx.float32), [mx.array(weight, mx.float32)], 32) is None
    # A channel that is never given anything is no reason to fail.
    x[:, 7] = 0
    assert np.isfinite(best_scales(mx.array(x, mx.float32), [mx.array(weight, mx.float32)], 32)).all()
