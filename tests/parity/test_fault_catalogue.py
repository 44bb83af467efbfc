"""Every fault breaks a run, and leaves nothing behind."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_mlx.requests.prompt_data as prompt_data
from lance_mlx.backend.numerics import policy
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.errors import LanceError
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.requests.request import Question, Request
from lance_mlx.requests.visuals import prepare_visuals
from parity.bundle.reading import read_bundle
from parity.errors import ParityError
from parity.lance.faults import CATALOGUE, PROFILES, Fault, Profile, Target, combined, load_fault
from parity.lance.faults.quantization import PACKED
from parity.lance.given import replay_of
from parity.lance.replay_mlx import replay_pipeline, request_from_bundle
from parity.tensors.metrics import compare
from parity.tensors.recording import Recording, Replay

ORACLES = Path(__file__).parents[2] / "oracles"
TASKS = ("t2i", "t2v", "x2t_image", "image_edit", "i2v")
"""Those of the embedded bundles, the fastest first."""
RUNS = tuple(
    (task, dtype, entry)
    for dtype in ("float32", "bfloat16")
    for entry in ("kv_cache", "full_sequence")
    for task in TASKS
)
# Runs repeat bit for bit, so whatever a fault moves is its own; less than this is what rounding may do as well.
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-3}
PREPROCESS = "preprocess"
COMPONENTS = """
    request sequence positions schedule guidance euler noise tokens embeddings embed_tokens vae2llm time_embedder
    latent_pos_embed layers.0.input_layernorm layers.0.input_layernorm_moe_gen layers.1.self_attn.q_proj
    layers.1.self_attn.v_proj_moe_gen layers.0.self_attn.q_norm layers.0.self_attn.k_norm_moe_gen
    layers.0.self_attn.q_rope layers.0.self_attn.sdpa layers.0.self_attn.o_proj layers.0.post_attention_layernorm
    layers.1.mlp.gate_proj layers.0.mlp_moe_gen.down_proj layers.0 norm norm_moe_gen llm2vae lm_head
    vit_model.patch_embed.proj vit_model.blocks.0.norm1 vit_model.blocks.0.attn.qkv vit_model.blocks.0.attn.q_rope
    vit_model.blocks.0.attn.proj vit_model.blocks.0.mlp.down_proj vit_model.merger.ln_q vit_model.merger.mlp.0
    vit_model.merger.mlp.1 vit_model.merger vae.encoder.conv1 vae.encoder.downsamples.0
    vae.encoder.downsamples.1.downsamples.2.time_conv
    vae.encoder.mean vae.encoder.logvar vae.encoder.sample vae.conv2 vae.decoder.conv1
    vae.decoder.middle.0.residual.0 vae.decoder.middle.1 vae.decoder.upsamples.0
    vae.decoder.upsamples.0.upsamples.3.time_conv vae.pixels frames preprocess
""".split()


@dataclass(frozen=True, eq=False)
class Case:
    """A short run of a bundle's request on a loaded model."""

    pipeline: Pipeline
    request: Request | Question
    replay: Replay
    rounding: float

    def run(self) -> Recording:
        return replay_pipeline(self.pipeline, self.request, self.replay).recording


@cache
def read(task: str) -> tuple[Any, Replay]:
    path = next(path for path in sorted(ORACLES.glob(f"{task}-*")) if path.is_dir())
    bundle = read_bundle(path)
    return bundle, replay_of(bundle)


@cache
def load_pipeline(variant: str, dtype: str, packed: bool = False) -> Pipeline:
    bundle, _ = read("t2i")
    recipe = Recipe.from_dict("towers", {"bits": 4, "group_size": 32, "*_moe_gen*": {"bits": 8}}) if packed else None
    return load(bundle.checkpoint / variant, variant, policy(dtype), looks=True, recipe=recipe)


@cache
def case_of(task: str, dtype: str, entry: str, demanding: bool, packed: bool = False) -> Case:
    """A run of two steps or two tokens; a demanding one leaves a step unguided, looks at several windows, and answers
    in eight tokens. With `packed` weights each tower's have a width of their own."""
    bundle, replay = read(task)
    request = request_from_bundle(bundle.request, entry)
    if isinstance(request, Question):
        # The full-sequence entry would go on to a multiple of 128 tokens.
        request = replace(request, max_new_tokens=8 if demanding else 2, entry="kv_cache")
    else:
        request = replace(request, num_steps=2, **({"guidance_interval": (0.8, 1.0)} if demanding else {}))
    if demanding and replay.vit_patches:
        grid = (2, 12, 12)
        patches = np.random.default_rng(0).standard_normal((int(np.prod(grid)), 1176)).astype(np.float32)
        replay = replace(replay, vit_patches=(patches,), vit_grids=(grid,))
    how = (request.variant, dtype, True) if packed else (request.variant, dtype)
    return Case(load_pipeline(*how), request, replay, ROUNDING[dtype])


@cache
def clean(*key: Any) -> Recording:
    return case_of(*key).run()


def moved(case: Case, before: Recording, after: Recording) -> bool:
    """Whether any tap is farther from what it was than rounding."""
    differences = [compare(before[name], after[name]) for name in before if name in after]
    return any(d.mismatch or d.rel_l2 is None or d.rel_l2 > case.rounding for d in differences)


def breaks(fault: Fault, *key: Any) -> bool:
    case, before = case_of(*key), clean(*key)
    try:
        with fault.patch(Target(case.pipeline)):
            return moved(case, before, case.run())
    except LanceError:
        return True


def preprocessed(task: str) -> list[np.ndarray]:
    bundle, _ = read(task)
    request = request_from_bundle(bundle.request, bundle.entry, ORACLES)
    return [array for visual in prepare_visuals(request) for array in (visual.pixels, visual.vit_patches)]


def state(pipeline: Pipeline) -> dict[str, Any]:
    """Everything that a fault may touch, by identity: functions, classes, modules and their parameters."""
    found: dict[str, Any] = {}
    for path, module in sorted(sys.modules.items()):
        if path.startswith("lance_mlx") or path in ("mlx.nn", "parity.lance.replay_mlx", "parity.lance.capture_mlx"):
            for name, value in vars(module).items():
                found[f"{path}.{name}"] = id(value)
                if isinstance(value, type) and value.__module__.startswith(("lance_mlx", "mlx.nn")):
                    found |= {f"{path}.{name}.{key}": id(each) for key, each in vars(value).items()}
    for root in (pipeline.model, pipeline.vae):
        for path, module in root.named_modules():
            found |= {f"{id(root)} {path} {key}": id(each) for key, each in module.items()}
            found |= {f"{id(root)} {path} {key}": id(each) for key, each in vars(module).items()}
    found |= {f"prompt {table} {key}": text for table in ("template", "instructions")
              for key, text in prompt_data.PROMPT_DATA[table].items()}  # fmt: skip
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def test_the_catalogue_is_large_and_its_names_are_plain_and_unique():
    from parity.lance.faults import loading

    assert len(CATALOGUE) >= 60
    assert len(CATALOGUE) == sum(len(module.FAULTS) for module in loading._MODULES)
    for name, fault in CATALOGUE.items():
        assert fault.name == name and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)
        assert re.fullmatch(r"[A-Z0-9<].*\.", fault.about) and "\n" not in fault.about
        assert fault.tasks and fault.dtypes and fault.entries


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_has_a_fault(component):
    assert any(fnmatchcase(component, fault.component) for fault in CATALOGUE.values())


@pytest.mark.parametrize("name", [name for name, fault in CATALOGUE.items() if fault.component != PREPROCESS])
def test_a_fault_breaks_a_run_and_mends_it(name):
    fault = CATALOGUE[name]
    suited = [run for run in RUNS if fault.touches(*run)]
    # What the embedded bundles hold no video for shows in a picture of two frames, which a demanding run looks at.
    demanding = bool(fault.needs) or not suited
    key = (*(suited or [("x2t_image", fault.dtypes[0], "kv_cache")])[0], demanding, fault.needs is PACKED)
    pipeline = case_of(*key).pipeline
    before = state(pipeline)
    assert breaks(fault, *key)
    assert changed(before, state(pipeline)) == []
    with pytest.raises(KeyError, match="inside"), fault.patch(Target(pipeline)):
        raise KeyError("inside")
    assert changed(before, state(pipeline)) == []


@pytest.mark.parametrize("name", [name for name, fault in CATALOGUE.items() if fault.component == PREPROCESS])
def test_a_fault_of_preprocessing_changes_what_pictures_become(name):
    fault, pipeline = CATALOGUE[name], load_pipeline("Lance_3B", "float32")
    before, given = state(pipeline), preprocessed("image_edit")
    with fault.patch(Target(pipeline)):
        broken = preprocessed("image_edit")
    assert not all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(given, broken, strict=True))
    assert changed(before, state(pipeline)) == []
    assert all(np.array_equal(a, b) for a, b in zip(given, preprocessed("image_edit"), strict=True))


def test_a_target_is_the_model_and_more():
    pipeline = load_pipeline("Lance_3B", "float32")
    target = Target(pipeline)
    assert target.pipeline is pipeline and target.model is pipeline.model and target.vae is pipeline.vae
    assert target.tokenizer is pipeline.tokenizer and target.language_model is pipeline.model.language_model
    assert set(target.modules("layers.0.self_attn.q_norm*")) == {
        "layers.0.self_attn.q_norm",
        "layers.0.self_attn.q_norm_moe_gen",
    }
    assert target.modules("vae.decoder.conv1")["vae.decoder.conv1"] is pipeline.vae.decoder.conv1
    with pytest.raises(AttributeError, match="nothing_like_it"):
        target.nothing_like_it  # noqa: B018


def test_several_faults_act_at_once_and_are_undone_in_the_opposite_order():
    pipeline = load_pipeline("Lance_3B", "float32")
    before = state(pipeline)
    faults = [load_fault(name) for name in ("temporal-stride-1", "grid-origin-0", "target-anchored-2000")]
    case = case_of("t2v", "float32", "kv_cache", False)
    right = clean("t2v", "float32", "kv_cache", False)["position_ids.cond"].array
    with combined(faults)(Target(case.pipeline)):
        ids = case.run()["position_ids.cond"].array
    latents = np.flatnonzero(read("t2v")[0].inputs["modality"].array == 1)[1:-1]
    frames, rows, columns = case.request.latent_grid
    t, h, w = np.indices((frames, rows, columns)).reshape(3, -1)
    opening = right[0, latents[0] - 1]
    assert np.array_equal(ids[:, latents], [2000 - opening + t, h, w])
    assert changed(before, state(pipeline)) == []


@pytest.mark.parametrize(("task", "dtype"), [("t2i", "float32"), ("t2v", "bfloat16"), ("x2t_image", "float32"),
                                             ("image_edit", "float32")])  # fmt: skip
def test_the_faults_of_a_profile_act_together(task, dtype):
    case = case_of(task, dtype, "kv_cache", False)
    before = state(case.pipeline)
    faults = PROFILES["xocialize-lance-mlx"].faults(task, dtype, "kv_cache")
    right = clean(task, dtype, "kv_cache", False)
    with combined(faults)(Target(case.pipeline)):
        assert moved(case, right, case.run())
    assert changed(before, state(case.pipeline)) == []


def test_a_profile_knows_which_departure_touches_which_run():
    profile = PROFILES["xocialize-lance-mlx"]
    assert list(profile.departures) == list(range(1, 22))
    earlier = PROFILES["xocialize-lance-mlx-earlier"]
    assert list(earlier.departures) == list(range(1, 23))

    def numbers(*run: str, profile: Profile = profile) -> list[int]:
        named = {fault.name for fault in profile.faults(*run)}
        assert len(named) == len(profile.faults(*run))
        return [n for n, group in profile.departures.items() if any(f.touches(*run) for f in group)]

    assert numbers("t2i", "float32", "kv_cache") == [1, 4, 7, 10, 11, 12, 17, 20]
    assert numbers("t2v", "bfloat16", "kv_cache") == [2, 3, 7, 10, 11, 12, 13, 14, 17, 20, 21]
    without = numbers("t2v", "bfloat16", "kv_cache", profile=earlier)
    assert without == [2, 3, 10, 11, 12, 13, 14, 17, 20, 21, 22]
    assert numbers("image_edit", "float32", "full_sequence") == [1, 5, 6, 7, 10, 11, 15, 16, 17, 18, 20]
    assert numbers("x2t_video", "bfloat16", "kv_cache") == [8, 9, 14, 18]
    assert numbers("i2v", "bfloat16", "kv_cache") == [19]
    # Every step of this bundle is guided.
    shown = [fault.name for fault in profile.faults_of(read("t2i")[0])]
    assert "renorm-channel" in shown and "guidance-at-every-step" not in shown


FILE = """
from contextlib import contextmanager, nullcontext
number = 3
text = "not a fault"

@contextmanager
def halved(model):
    '''The final norm's weight is halved.

    More about it.
    '''
    norm = model.language_model.model.norm
    before = norm.weight
    norm.weight = before / 2
    try:
        yield
    finally:
        norm.weight = before

def undecorated(model):
    yield

def failing(model):
    raise ValueError("no such part")

@contextmanager
def failing_inside(model):
    raise ValueError("nothing to break")
    yield

@contextmanager
def failing_after(model):
    yield
    raise ValueError("nothing to mend")

wrapped = lambda model: nullcontext(model)
"""


@contextmanager
def applied(spec: str) -> Iterator[None]:
    with load_fault(spec).patch(Target(load_pipeline("Lance_3B", "float32"))):
        yield


def test_a_fault_comes_from_a_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FILE, encoding="utf-8")
    spec = f"{path}:halved"
    fault = load_fault(spec)
    assert (fault.name, fault.about, fault.component) == (spec, "The final norm's weight is halved.", "*")
    pipeline = load_pipeline("Lance_3B", "float32")
    norm = pipeline.model.language_model.model.norm
    weight = np.array(norm.weight)
    with fault.patch(Target(pipeline)):
        assert np.array_equal(np.array(norm.weight), weight / 2)
    assert np.array_equal(np.array(norm.weight), weight)
    # What goes wrong inside is not the fault's doing.
    with pytest.raises(KeyError), fault.patch(Target(pipeline)):
        raise KeyError("inside")
    assert np.array_equal(np.array(norm.weight), weight)
    with applied(f"{path}:wrapped"):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "defines no missing"),
        ("", "defines no such name"),
        ("number", "number is no function but a int"),
        ("text", "text is no function but a str"),
        ("undecorated", "returned a generator, which is no context manager"),
        ("failing", "cannot be applied: ValueError: no such part"),
        ("failing_inside", "cannot be applied: ValueError: nothing to break"),
        ("failing_after", "cannot be undone: ValueError: nothing to mend"),
    ],
)
def test_what_a_file_holds_may_be_no_fault(tmp_path, name, message):
    path = tmp_path / "own.py"
    path.write_text(FILE, encoding="utf-8")
    with pytest.raises(ParityError, match=re.escape(message)) as caught, applied(f"{path}:{name}"):
        pass
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_it", "cannot be imported: ModuleNotFoundError"),
        ("def broken(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("assert False", "cannot be imported: AssertionError"),
    ],
)
def test_a_file_may_not_be_importable(tmp_path, text, message):
    path = tmp_path / "own.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParityError, match=message) as caught:
        load_fault(f"{path}:broken")
    assert "\n" not in str(caught.value)


def test_unknown_faults_are_errors_of_one_line(tmp_path):
    with pytest.raises(ParityError, match="there is no Python file .*own.py"):
        load_fault(f"{tmp_path / 'own.py'}:broken")
    with pytest.raises(ParityError, match="there is no Python file"):
        load_fault(f"{tmp_path}.py:broken")
    with pytest.raises(ParityError, match="did you mean 'rope-pairs'"):
        load_fault("rope-pair")
    with pytest.raises(ParityError, match="name one of the catalogue"):
        load_fault("nothing at all like it")
