"""Hypotheses: what each says of the reference, that they leave no trace, add up, and are read from a file."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from parity.bundle.reading import read_bundle
from parity.errors import ParityError
from parity.hypotheses import DoesNotApply, Hypothesis, attempt, check_unique, load_hypotheses
from parity.hypotheses.tap_probe import TapProbe, site_of
from parity.lance.hypotheses import HYPOTHESES, quantization
from parity.lance.hypotheses.counting import Recipe, counted
from parity.lance.hypotheses.drafts import added, array_of, draft_of
from parity.lance.hypotheses.tokens import call_rows, pass_tokens
from parity.lance.names import parse
from parity.oracle.oracle import Oracle
from reference.layout import Role

ROOT = Path(__file__).parents[2]
BY_NAME = {hypothesis.name: hypothesis for hypothesis in HYPOTHESES}
LAYER = "language_model.model.layers.1"
ATTENTION = f"{LAYER}.self_attn"
HEAD = "language_model.lm_head.weight"


@cache
def oracle_of(name: str) -> Oracle:
    return Oracle.of(read_bundle(ROOT / "oracles" / name))


def at(bundle: str, tap: str) -> TapProbe:
    """The site of a tap of an embedded bundle, of which nothing was computed yet."""
    oracle = oracle_of(bundle)
    return site_of(oracle, tap, np.zeros(0, np.float32), dict(oracle.exact.arrays))


def at_weight(bundle: str, name: str) -> TapProbe:
    """The site of a parameter, of which the reference's own value was loaded."""
    oracle = oracle_of(bundle)
    part = name.startswith("vae.")
    root = oracle.run.pipeline.vae if part else oracle.run.pipeline.model
    array = root.state_dict()[name.removeprefix("vae.")].float().numpy()
    return TapProbe(oracle, parse(f"weights/{name}"), array, array, {})


def state_of(bundle: str) -> dict[str, torch.Tensor]:
    pipeline = oracle_of(bundle).run.pipeline
    return {name: value.clone() for name, value in pipeline.model.state_dict().items()}


def test_names_are_unique_and_in_words():
    check_unique(HYPOTHESES)
    for hypothesis in HYPOTHESES:
        assert re.fullmatch(r"[\w<|>'’ ,;/().*+=\[\]-]+", hypothesis.name), hypothesis.name
        assert not hypothesis.name.endswith(".")
    with pytest.raises(ParityError, match="two hypotheses are called 'a'"):
        check_unique([Hypothesis("a", ("*",)), Hypothesis("a", ("x",))])


def test_every_hypothesis_is_about_a_component_that_runs_have():
    components = {"frames", "tokens", "grids", "preprocess", "latent_pos_embed"}
    for bundle in ("t2i-fp32-kv", "image_edit-fp32-nokv", "x2t_image-bf16-kv", "t2v-bf16-kv", "i2v-fp32-nokv"):
        oracle = oracle_of(bundle)
        components |= {parse(name).component for name in [*oracle.taps, *oracle.exact.arrays]}
    lost = [h.name for h in HYPOTHESES if not any(h.about(component) for component in components)]
    assert lost == []


def test_no_component_has_more_hypotheses_than_can_be_tried_in_seconds():
    """Integers cost nothing; a tap is computed anew for each, in some 20 milliseconds."""
    oracle = oracle_of("t2i-fp32-kv")
    for name in oracle.taps:
        component = parse(name).component
        if component != "positions":
            assert sum(h.about(component) for h in HYPOTHESES) <= 95, component


# Places that between them give every hypothesis something to change.
SITES = {
    "t2i-fp32-kv": [
        *(
            f"cond.step0/{ATTENTION}.{part}"
            for part in ("q_proj_moe_gen", "k_proj", "q_norm_moe_gen", "k_norm", "q_rope")
        ),
        *(f"cond.step0/{ATTENTION}.{part}" for part in ("sdpa", "o_proj_moe_gen")),
        *(f"{call}/{ATTENTION}.sdpa" for call in ("cond.prefix0", "cond.prefix1", "uncond.step0", "cond.step1")),
        *(f"cond.step0/{LAYER}.{part}" for part in ("input_layernorm", "post_attention_layernorm_moe_gen")),
        *(f"cond.step0/{LAYER}.mlp_moe_gen.{part}" for part in ("gate_proj", "down_proj")),
        *(
            f"cond.step0/{part}"
            for part in (LAYER, "hidden_in", "time_embedder", "latent_pos_embed", "llm2vae", "vae2llm")
        ),
        "cond.prefix0/language_model.model.embed_tokens",
        *(
            "sampler.velocity0",
            "sampler.x_t1",
            "sampler.x_init",
            "pixels",
            "vae.decode.chunk0/conv2",
        ),
        *("inputs/guided", "inputs/position_ids.cond", "inputs/position_ids.uncond"),
        *("inputs/text_ids", "inputs/text_ids.uncond", "inputs/split_lens"),
        *("frames", "sampler.x_t2", "cond.step1/time_embedder", f"weights/{ATTENTION}.q_proj_moe_gen.weight"),
    ],
    "t2v-bf16-kv": [
        *(f"cond.step0/{ATTENTION}.{part}" for part in ("v_proj_moe_gen", "q_norm_moe_gen", "k_rope")),
        f"cond.prefix0/{ATTENTION}.k_rope",
        *(f"cond.step0/{part}" for part in (LAYER, "hidden_in", "latent_pos_embed", f"{LAYER}.mlp.down_proj")),
        *("inputs/position_ids.cond", "inputs/grids_thw", "sampler.velocity0", "sampler.x_t1"),
        *(f"vae.decode.chunk2/decoder.{part}" for part in ("conv1", "upsamples.0")),
        *("vae.decode.chunk1/decoder.upsamples.0.upsamples.3.time_conv", "vae.decode.chunk0/conv2", "frames"),
        *("vae.decode.chunk1/decoder.upsamples.1.upsamples.3.resample.1", "cond.step0/time_embedder"),
        *(f"vae.decode.chunk{i}/decoder.upsamples.0.upsamples.3.resample.1" for i in range(2)),
        *(f"vae.decode.chunk0/decoder.middle.{part}" for part in ("0.residual.0", "0.residual.2", "1.proj", "0", "1")),
    ],
    "image_edit-fp32-nokv": [
        *(f"cond.prefix1/{LAYER}.{part}" for part in ("input_layernorm", "self_attn.sdpa", "self_attn.q_rope")),
        *(f"cond.prefix2/{LAYER}.{part}" for part in ("input_layernorm_moe_gen", "self_attn.sdpa")),
        *(f"{call}/{ATTENTION}.sdpa" for call in ("cond.step0", "cond.prefix3")),
        *("cond.prefix2/hidden_in", "cond.prefix3/language_model.model.layers.1.self_attn.q_proj"),
        *("inputs/position_ids.cond", "inputs/position_ids.uncond", "inputs/text_ids", "inputs/modality"),
        *("inputs/attn_modes", "inputs/text_ids.uncond", "vae.latent0"),
        *("vae.encode0.mean", "vae.encode0.logvar", "vae.encode0.chunk0/encoder.conv1"),
        "vae.encode0.chunk0/encoder.downsamples.0.downsamples.2.resample.1",
        "vae.encode0.chunk0/encoder.downsamples.0",
    ],
    "x2t_image-bf16-kv": [
        *(f"cond.prefill1/{part}" for part in ("hidden_in", f"{ATTENTION}.q_norm")),
        *("cond.decode0/language_model.lm_head", "inputs/position_ids.cond", "cond.decode1/position_ids", "tokens"),
        *(f"vit_model0.{part}" for part in ("patch_embed", "merger.ln_q", "merger.mlp.0", "merger.mlp.1")),
        *(f"vit_model0.blocks.0.{part}" for part in ("norm1", "norm2", "attn.qkv", "attn.q_rope", "attn.k_rope")),
        *(f"vit_model0.blocks.0.{part}" for part in ("attn.proj", "mlp.down_proj")),
        *("vit_model0.blocks.0", "vit_model0"),
    ],
    "i2v-fp32-nokv": ["cond.step0/hidden_in", "sampler.x_init", "inputs/position_ids.cond"],
}


# What the small embedded requests give nothing to change: patterns of names, and what would be needed.
UNSEEN = (
    # what it makes of a weight follows from what was computed
    *(r"^the weight is kept in float32$",),
    # a video that is looked at or edited
    *(
        r"^the (ViT block|source)'s temporal stride",
        r"^blocks attend across frames$",
        r"^answer positions do not advance$",
    ),
    *(r"^frames of patches are exchanged$", r"^patches hold their first frame twice$", r"^the average pads with zeros"),
    # a picture of more than one window
    *(r"^windows are", r"in window order$", r"the wrong way$", r"in reading order$", r"reading order of tokens$"),
    *(r"^every block attends to",),
    # another prompt, task or setting; what upstream does in these already
    *(r"^the instruction has a typographic", r"^the prompt is", r"^the subject has the role"),
    *(r"^guidance acts (at every|in the default)", r"holds both its ends$"),
    r"^the given frame moves$",
    # other widths of the VAE, other values
    *(r"^the shortcut's channels", r"^the shortcut keeps", r"^the log-variance is clipped", r"^the vocabulary is not"),
    r"^the weight is the vision tower's own",
    # pixels as a run is given them
    *(r"^pictures are", r"^the resolutions of VAE and ViT"),
    # packed weights: test_quantized_faults.py
    *(f"^{re.escape(hypothesis.name)}$" for hypothesis in quantization.HYPOTHESES),
)


@cache
def changed_at(bundle: str, tap: str) -> frozenset[str]:
    """Names of the hypotheses that change what is computed at a place; each must leave no trace."""
    site = at_weight(bundle, tap.removeprefix("weights/")) if tap.startswith("weights/") else at(bundle, tap)
    before, changed = attempt(site, []), set()
    for hypothesis in HYPOTHESES:
        if not hypothesis.about(site.component):
            continue
        array = attempt(site, [hypothesis])
        if array is None:
            continue
        assert array.dtype in (before.dtype, np.float32), hypothesis.name
        assert np.isfinite(array).all(), hypothesis.name
        if array.shape != before.shape or not np.array_equal(array, before):
            changed.add(hypothesis.name)
    if site.module is not None or tap.startswith(("sampler.", "cond.")):
        np.testing.assert_array_equal(site.recompute(), before)
    return frozenset(changed)


@pytest.mark.parametrize(("bundle", "tap"), [(bundle, tap) for bundle, taps in SITES.items() for tap in taps])
def test_hypotheses_change_what_is_computed_and_leave_no_trace(bundle: str, tap: str):
    assert changed_at(bundle, tap)


def test_every_hypothesis_changes_something():
    changed = {name for bundle, taps in SITES.items() for tap in taps for name in changed_at(bundle, tap)}
    left = {hypothesis.name for hypothesis in HYPOTHESES if hypothesis.name not in changed}
    unseen = {name for name in left if any(re.search(pattern, name) for pattern in UNSEEN)}
    assert left == unseen


def test_patches_of_weights_give_the_parameters_back():
    site = at("t2i-fp32-kv", f"cond.step0/{ATTENTION}.v_proj")
    before = state_of("t2i-fp32-kv")
    keys = list(site.module._parameters)
    for hypothesis in HYPOTHESES:
        if hypothesis.about(site.component):
            attempt(site, [hypothesis])
    after = site.pipeline.model.state_dict()
    assert list(site.module._parameters) == keys and "forward" not in vars(site.module)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_patches_are_undone_when_the_reference_fails():
    site = at("t2i-fp32-kv", f"cond.step0/{ATTENTION}.q_norm")
    before = site.recompute()

    def failing(site: TapProbe):
        raise RuntimeError("no")

    broken = Hypothesis("fails", ("*",), failing)
    with pytest.raises(RuntimeError, match="no"):
        attempt(site, [BY_NAME["norm eps is 1e-3"], broken])
    np.testing.assert_array_equal(site.recompute(), before)


def test_what_does_not_apply_is_no_candidate():
    site = at("t2i-fp32-kv", f"cond.prefix0/{ATTENTION}.sdpa")
    lacking = BY_NAME["the cache lacks its last token"]
    assert attempt(site, [lacking]) is None
    assert attempt(site, [BY_NAME["text attends in both directions"], lacking]) is None

    def refuses(site: TapProbe):
        raise DoesNotApply

    assert attempt(site, [Hypothesis("refuses", ("*",), refuses)]) is None
    assert attempt(site, [Hypothesis("nothing to say", ("*",), transform=lambda site, array: None)]) is None


def test_hypotheses_add_up():
    site = at("t2i-fp32-kv", f"cond.step0/{ATTENTION}.q_rope")
    pairs, slow = (
        BY_NAME["RoPE turns neighbouring pairs instead of halves"],
        BY_NAME["RoPE frequencies fall half as fast"],
    )
    both = attempt(site, [pairs, slow])
    np.testing.assert_array_equal(both, attempt(site, [slow, pairs]))
    assert all(not np.array_equal(both, attempt(site, [one])) for one in (pairs, slow))
    site = at("x2t_image-bf16-kv", "vit_model0.blocks.0.attn.k_rope")
    pairs, back = BY_NAME["the ViT's RoPE turns neighbouring pairs"], BY_NAME["the ViT's RoPE turns the other way"]
    both = attempt(site, [pairs, back])
    np.testing.assert_array_equal(both, attempt(site, [back, pairs]))
    assert all(not np.array_equal(both, attempt(site, [one])) for one in (pairs, back))


def test_positions_of_a_port_are_put_together_of_three_causes():
    """Frames one apart, rows and columns from 0, the block at 2000: what a public port does, in any order."""
    site = at("t2v-bf16-kv", "inputs/position_ids.cond")
    target = site.layout.target
    ids = site.expected.copy()
    frames, rows, columns = np.indices((target.grid.frames, target.grid.rows, target.grid.columns)).reshape(3, -1)
    ids[:, target.inside] = np.stack([2000 + frames, rows, columns])
    causes = [
        BY_NAME["the target's temporal stride alone is 1"],
        BY_NAME["the target's rows and columns start at 0"],
        BY_NAME["the target's first cell is anchored at 2000"],
    ]
    for order in (causes, causes[::-1], causes[1:] + causes[:1]):
        np.testing.assert_array_equal(attempt(site, order), ids)


@pytest.mark.parametrize(
    "bundle", ["t2i-fp32-kv", "t2v-bf16-kv", "i2v-fp32-nokv", "image_edit-fp32-nokv", "x2t_image-bf16-kv"]
)
def test_upstream_counts_and_lays_out_as_the_defaults_say(bundle: str):
    oracle = oracle_of(bundle)
    for name, expected in oracle.exact.arrays.items():
        site = site_of(oracle, name, expected, dict(oracle.exact.arrays))
        if "position_ids" in name:
            ids = counted(site, Recipe())
            np.testing.assert_array_equal(ids[:, : expected.shape[1]], expected)
        array = array_of(name.removeprefix("inputs/"), draft_of(site, "uncond" if "uncond" in name else "cond"))
        if array is not None:
            np.testing.assert_array_equal(array, expected)
    site = at(bundle, next(iter(oracle.exact.arrays)))
    draft = draft_of(site, "cond")
    for name, expected in oracle.layout.arrays().items():
        array = array_of(name, draft)
        if array is not None:
            np.testing.assert_array_equal(array, expected, err_msg=name)


def test_the_rows_of_a_call():
    site = at("image_edit-fp32-nokv", f"cond.step0/{ATTENTION}.sdpa")
    tokens, layout = pass_tokens(site), site.layout
    assert tokens.queries == len(layout.text_ids) and call_rows(site) == layout.target.rows
    np.testing.assert_array_equal(tokens.role, layout.roles)
    np.testing.assert_array_equal(np.flatnonzero(tokens.gen), layout.latent_rows)
    np.testing.assert_array_equal(np.flatnonzero(tokens.gen & ~tokens.clean), layout.made_rows)
    site = at("t2i-fp32-kv", f"uncond.step0/{ATTENTION}.sdpa")
    assert pass_tokens(site).queries == site.layout.target.length
    assert Role.TEXT not in pass_tokens(site).role


@pytest.mark.parametrize(
    ("bundle", "tap", "names"),
    [
        ("t2i-fp32-kv", "inputs/text_ids", (
            "the closing <|im_end|> is missing", "a line break follows the closing <|im_end|>")),
        ("x2t_image-bf16-kv", "inputs/grids_thw", (
            "the ViT block is missing", "rows and columns of grids are exchanged")),
        ("x2t_image-bf16-kv", "inputs/grids_thw", ("grids have one frame too few", "the ViT block is missing")),
        ("t2i-fp32-kv", "vae.decode.chunk0/decoder.conv1", (
            "the weight is the other variant's", "the result is rounded to float16")),
        ("t2v-bf16-kv", f"cond.step0/{LAYER}.input_layernorm", (
            "the norm's result is not rounded", "the brackets of latents go to the generation expert")),
    ],
)  # fmt: skip
def test_hypotheses_of_other_shapes_and_dtypes_go_together(bundle, tap, names):
    for order in (names, names[::-1]):
        attempt(at(bundle, tap), [BY_NAME[name] for name in order])


def test_changes_of_a_list_add_up():
    base = np.arange(8)
    cut, longer, marked = np.delete(base, 2), np.insert(base, 6, 9), np.where(base == 5, 50, base)
    assert added(base, base, cut).tolist() == cut.tolist()
    assert added(base, cut, longer).tolist() == [0, 1, 3, 4, 5, 9, 6, 7]
    assert added(base, longer, cut).tolist() == [0, 1, 3, 4, 5, 9, 6, 7]
    assert added(base, marked, np.where(base == 1, 10, base)).tolist() == [0, 10, 2, 3, 4, 50, 6, 7]
    assert added(base, cut, np.delete(base, [1, 2, 3])) is None


def test_weights_of_others():
    pipeline = oracle_of("t2i-fp32-kv").run.pipeline
    state = {name: value.numpy() for name, value in pipeline.model.state_dict().items()}
    for name, hypothesis, other in (
        (f"{LAYER}.mlp.up_proj.weight", "the other expert's weight", f"{LAYER}.mlp_moe_gen.up_proj.weight"),
        (f"{LAYER}.mlp.up_proj.weight", "gate and up are exchanged", f"{LAYER}.mlp.gate_proj.weight"),
        (f"{LAYER}.mlp.up_proj.weight", "the next layer's weight", LAYER.replace("1", "2") + ".mlp.up_proj.weight"),
        (f"{ATTENTION}.k_proj.bias", "the weight of v_proj", f"{ATTENTION}.v_proj.bias"),
        (HEAD, "the head is tied to the token embeddings", "language_model.model.embed_tokens.weight"),
    ):  # fmt: skip
        candidate = attempt(at_weight("t2i-fp32-kv", name), [BY_NAME[hypothesis]])
        np.testing.assert_array_equal(candidate, state[other], err_msg=hypothesis)


OWN = """
from parity.hypotheses import Hypothesis

threes = Hypothesis("the result is three times as large", ("*",), transform=lambda site, array: 3 * array)
more = [threes, Hypothesis("the result is 7", ("llm2vae",), transform=lambda site, array: 0 * array + 7)]
"""


def test_hypotheses_of_a_file(tmp_path: Path):
    path = tmp_path / "own.py"
    path.write_text(OWN, encoding="utf-8")
    loaded = load_hypotheses(path)
    assert [h.name for h in loaded] == ["the result is three times as large", "the result is 7"]
    site = at("t2i-fp32-kv", "cond.step0/llm2vae")
    np.testing.assert_array_equal(attempt(site, loaded[:1]), 3 * site.recompute())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no Python file"),
        ("x = 1", "holds no Hypothesis"),
        ("def broken(:", "cannot be imported: SyntaxError"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        (OWN + "again = Hypothesis('the result is 7', ('*',))", "two hypotheses are called 'the result is 7'"),
    ],
)
def test_a_file_that_is_of_no_use(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ParityError, match=message) as error:
        load_hypotheses(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_python(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text(OWN, encoding="utf-8")
    with pytest.raises(ParityError, match="there is no Python file"):
        load_hypotheses(path)
