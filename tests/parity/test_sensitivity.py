"""Where bits are needed: groups, what is measured of them, the knapsack, and the recipe that comes of it."""

import itertools
import json
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
from typer.testing import CliRunner

from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.model.quantized import quantizable
from lance_mlx.requests.request import Variant
from parity.cli.main import app
from parity.errors import ParityError
from parity.lance.sensitivity import budget, measure
from parity.lance.sensitivity.budget import Option, frontier, solve
from parity.lance.sensitivity.cases import read_inputs
from parity.lance.sensitivity.groups import AS_IS, as_quantized
from parity.lance.sensitivity.measure import Session
from parity.lance.sensitivity.measured import Plan, bytes_of

PLANTED = (1, 4)
WIDTHS = (3, 4, 6)


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done < (total or 10)


def requests(path: Path, prompts: dict[str, int], **more: object) -> Path:
    drawn = {"task": "t2i", "height": 32, "width": 48, "num_steps": 2}
    path.write_text(json.dumps([drawn | {"prompt": prompt, "seed": seed} | more for prompt, seed in prompts.items()]))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A checkpoint of six layers, of which two have planted outliers."""
    folder = tmp_path_factory.mktemp("planted") / "checkpoint"
    layers = ",".join(map(str, PLANTED))
    assert make_checkpoint.main([str(folder), "--layers", "6", "--variant", "image", "--planted", layers]) == 0
    return folder


@pytest.fixture(scope="module")
def session(planted, tmp_path_factory):
    """Measured layer by layer on two requests, with a budget of what 4 bits in groups of 32 take."""
    folder = tmp_path_factory.mktemp("session")
    inputs = read_inputs([requests(folder / "r.json", {"a red bird": 1, "two boats on a lake": 2})], planted, "float32")
    found = Session(Plan(inputs, WIDTHS, 6, 32), folder / "measured.json", quiet)
    return found, found.run("5bits")


# The knapsack.


def everything(groups, room):
    """The least cost by trying all."""
    costs = [
        sum(o.cost for o in picked) for picked in itertools.product(*groups) if sum(o.size for o in picked) <= room
    ]
    return min(costs)


def some_groups(seed, unit):
    rng = np.random.default_rng(seed)
    return [
        [
            Option(int(size) * unit, float(cost))
            for size, cost in zip(sorted(rng.integers(1, 50, 4)), rng.random(4), strict=True)
        ]
        for _ in range(5)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all(seed):
    groups = some_groups(seed, 64)
    least, most = (sum(f(o.size for o in options) for options in groups) for f in (min, max))
    for room in (least, (least + most) // 2, most, 2 * most):
        choice = solve(groups, room)
        picked = [options[index] for options, index in zip(groups, choice.picked, strict=True)]
        assert sum(o.size for o in picked) == choice.size <= room
        assert choice.cost == choice.bound == pytest.approx(everything(groups, room))
        assert choice.cost == pytest.approx(sum(o.cost for o in picked))
    sizes, costs = zip(*frontier(groups), strict=True)
    assert list(sizes) == sorted(sizes) and list(costs) == sorted(costs, reverse=True) and sizes[0] >= least
    with pytest.raises(ParityError, match="the budget is too small"):
        solve(groups, least - 1)


@pytest.mark.parametrize("seed", range(4))
def test_what_rounding_of_sizes_may_lose_is_told(seed, monkeypatch):
    groups = some_groups(seed, 61)
    monkeypatch.setattr(budget, "CELLS", 40)
    room = sum(max(o.size for o in options) for options in groups) * 2 // 3
    choice = solve(groups, room)
    assert choice.size <= room and choice.bound <= everything(groups, room) <= choice.cost + 1e-12


# Groups and runs.


def test_every_matrix_is_in_one_group(session):
    found, measured = session
    modules = quantizable(found.pipeline.model)
    paths = [path for group in found.groups for path in group.shapes]
    assert len(set(paths)) == len(paths)
    assert {path for path in modules if path not in paths} == {
        "llm2vae",
        "time_embedder.mlp.0",
        "time_embedder.mlp.2",
        "vae2llm",
    }
    assert "understanding q, k, v 1" in {group.name for group in found.groups}
    # A picture reads no head, and of the text in the last layer nothing but keys and values.
    assert set(measured.unread) == {"head", *(f"understanding {kind} 5" for kind in ("o", "gate, up", "down"))}


def test_weights_come_back(session):
    found, _ = session
    path = "language_model.model.layers.0.mlp.up_proj"
    before = found.pipeline.model.language_model.model.layers[0].mlp.up_proj.weight
    schemes = found.groups[0].schemes(4, 32) | {path: next(iter(found.groups[0].schemes(3, 32).values()))}
    with pytest.raises(KeyError), as_quantized(found.pipeline.model, schemes):
        assert not np.array_equal(found.pipeline.model.language_model.model.layers[0].mlp.up_proj.weight, before)
        raise KeyError
    assert found.pipeline.model.language_model.model.layers[0].mlp.up_proj.weight is before


def test_fewer_bits_do_more_and_costs_add_up(session):
    found, measured = session
    for group in found.groups:
        costs = [measured.cost(group, bits) for bits in (*WIDTHS, AS_IS)]
        assert costs == sorted(costs, reverse=True) and (costs[0] > 4 * costs[2]) == (group.name not in measured.unread)
    assert all(0.5 < ratio < 1.5 for ratio in measured.pairs.values()) and len(measured.pairs) == 6
    predicted, ran = measured.solved.predicted, [each.cost for each in measured.solved.measured]
    assert all(0.5 < p / r < 2 for p, r in zip(predicted, ran, strict=True))


def test_the_recipe_beats_even_bits_on_other_requests_and_gives_the_planted_layers_theirs(session, planted, tmp_path):
    found, measured = session
    solved = measured.solved
    assert solved.size <= measured.size(4) and solved.choice.cost == solved.choice.bound
    unseen = requests(tmp_path / "r.json", {"a green house": 7, "the sea at night": 8, "a cat": 9})
    other = Session(Plan(read_inputs([unseen], planted, "float32"), WIDTHS, 6, 32), tmp_path / "measured.json", quiet)
    read = [group.name for group in found.groups if group.name not in measured.unread]
    bits = dict(zip((group.name for group in found.groups), solved.bits, strict=True))
    even, ours = (other.effects(widths) for widths in (dict.fromkeys(read, 4), {name: bits[name] for name in read}))
    assert all(mine.cost**0.5 <= 0.6 * theirs.cost**0.5 for mine, theirs in zip(ours, even, strict=True))
    given = {True: [], False: []}
    for group in found.groups:
        # `o` has none planted.
        if group.name in read and group.layers and group.kind != "o":
            given[group.layers[0] in PLANTED].append(bits[group.name])
    assert np.mean(given[True]) > np.mean(given[False]) + 1.5


@pytest.mark.exhaustive
def test_the_recipe_beats_even_bits_where_all_weights_have_outliers(tmp_path):
    """At a size at which errors still add up: at 4 and 5 bits these weights make another picture."""
    folder, widths = tmp_path / "checkpoint", (3, 4, 5, 6, 8)
    assert make_checkpoint.main([str(folder), "--layers", "6", "--variant", "image", "--profile", "outlier"]) == 0
    solve_on = requests(tmp_path / "a.json", {"a red bird": 2, "two boats on a lake": 3})
    unseen = requests(tmp_path / "b.json", {"a green house": 4, "the sea at night": 5, "a cat": 6})
    found, other = (
        Session(Plan(read_inputs([path], folder, "float32"), widths, 6, 32), path.with_suffix(".kept"), quiet)
        for path in (solve_on, unseen)
    )
    measured = found.run("7bits")
    bits = dict(zip((group.name for group in found.groups), measured.solved.bits, strict=True))
    assert measured.solved.size <= measured.size(6)
    read = [group.name for group in found.groups if group.name not in measured.unread]
    even, ours = (other.effects(each) for each in (dict.fromkeys(read, 6), {name: bits[name] for name in read}))
    assert sum(mine.cost for mine in ours) ** 0.5 <= 0.6 * sum(theirs.cost for theirs in even) ** 0.5


def test_convert_takes_the_recipe_and_the_size_is_right(session, planted, tmp_path):
    _, measured = session
    (tmp_path / "recipe.json").write_text(json.dumps(measured.solved.recipe))
    recipe = Recipe.from_file(tmp_path / "recipe.json")
    source = find_checkpoint(planted, Variant.IMAGE)
    how = "bfloat16", 10**9, ViTSource.LANCE, recipe
    prepare("it", source, tmp_path / "out", *how).run(lambda *_: lambda _: None)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == measured.solved.size


def test_planted_layers_compute_the_same_and_quantize_worse(planted, session, tmp_path):
    found, measured = session
    assert make_checkpoint.main([str(tmp_path / "plain"), "--layers", "6", "--variant", "image"]) == 0
    case = found.plan.inputs.cases[0]
    plain = measure.load(tmp_path / "plain", Variant.IMAGE, measure.policy("float32"))
    assert np.allclose(measure.run(case, plain).latents, measure.run(case, found.pipeline).latents, atol=1e-4)
    assert make_checkpoint.main([str(tmp_path / "no"), "--layers", "2", "--planted", "2"]) == 2


# Going on, and answers.


def test_a_measurement_goes_on_where_it_was_ended(session, monkeypatch):
    found, measured = session
    again = Session(found.plan, found._kept, quiet)
    monkeypatch.setattr(measure, "run", lambda *given: pytest.fail("this was measured"))
    assert again.run("5bits").to_json() == measured.to_json()
    with pytest.raises(ParityError, match="holds measurements of other runs"):
        Session(Plan(found.plan.inputs, WIDTHS, 5, 32), found._kept, quiet)
    assert isinstance(json.dumps(measured.to_json(), allow_nan=False), str)


@pytest.fixture
def lance_parity(oracles, monkeypatch):
    monkeypatch.chdir(oracles.parent)
    return lambda *arguments: CliRunner().invoke(app, ["sensitivity", *map(str, arguments)])


def test_the_command_on_an_answer(lance_parity, tmp_path):
    options = ("oracles/x2t_image-bf16-kv", "--bits", "4,8", "--bands", 1, "--group-size", 32)
    done = lance_parity(*options, "--budget", "6bits", "--out", tmp_path / "out", "--json", tmp_path / "all.json")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str(tmp_path / "out" / name) for name in ("recipe.json", "index.html")]
    found = json.loads((tmp_path / "all.json").read_text())
    unread = {group["name"] for group in found["groups"] if group["unread"]}
    assert {"generation o 0-2", "generation down 0-2"} <= unread and "head" not in unread and "ViT" not in unread
    by = {(each["group"], each["bits"]): each["effects"][0] for each in found["single"]}
    assert by["head", 4]["cost"] > 4 * by["head", 8]["cost"] > 0 and len(by["head", 4]["steps"]) > 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "understanding q, k, v 0-2" in page and "nats" in page
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["language_model.model.layers.0.self_attn.q_proj_moe_gen"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("oracles/t2i-fp32-kv", "--bits", "4,7"), "bits 4, 7 must be of 3, 4, 5, 6, 8"),
        (("oracles/t2i-fp32-kv", "--bits", "four"), "--bits four must be numbers"),
        (("oracles/t2i-fp32-kv", "oracles/t2v-fp32-nokv"), "measure images and videos one after the other"),
        (("oracles/t2i-fp32-kv", "oracles/t2i-fp32-kv"), "is given twice"),
        (("oracles/t2i-fp32-kv", "oracles/x2t_image-bf16-kv"), "name one with --numerics"),
        (("README.md",), "is neither a bundle nor a JSON file of requests"),
        (("oracles/t2i-fp32-kv", "--bands", "0"), "there must be a band of layers"),
    ],
)
def test_bad_input_is_one_line(lance_parity, tmp_path, arguments, said):
    done = lance_parity(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_overwritten(lance_parity, tmp_path):
    (tmp_path / "recipe.json").write_text("mine")
    done = lance_parity("oracles/t2i-fp32-kv", "--out", tmp_path)
    assert done.exit_code == 2 and "is not of this command" in done.stderr
    (tmp_path / "recipe.json").rename(tmp_path / "measured.json")
    done = lance_parity("oracles/t2i-fp32-kv", "--out", tmp_path)
    assert done.exit_code == 2 and "holds no measurements of this command" in done.stderr
    assert (tmp_path / "measured.json").read_text() == "mine"


def test_a_budget_is_a_size_or_bits(session):
    found, measured = session
    assert bytes_of("7.5GB", measured) == 7_500_000_000
    # Scales and biases of groups of 32 take a bit.
    assert bytes_of("5bits", measured) == measured.size(4)
    for wrong in ("7.5", "GB", "0bits", "-1GB", "1e3GB"):
        with pytest.raises(ParityError, match="neither a size"):
            bytes_of(wrong, measured)
