"""Break lance_mlx in one place at a time: the check must fail and name that place."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import lance_mlx.sampling.flow as flow
import reference.numerics
from lance_mlx.backend.numerics import Numerics
from lance_mlx.model.mot import KeyValues, ScaledDotProductAttention
from lance_mlx.model.vae_decoder import Resample
from lance_mlx.model.vae_layers import StreamState
from lance_mlx.pipeline import Pipeline
from lance_mlx.requests.request import Entry, Renorm, Request
from lance_mlx.sequence.segments import Role, Sequence
from parity.bundle.reading import read_bundle, write_bundle
from parity.comparison.check import Result, check_bundle
from parity.lance import replay_mlx
from parity.lance.given import wanted
from parity.lance.trusted import load_run

ROOT = Path(__file__).parents[2]
ORACLES = ROOT / "oracles"

Patch = Callable[[pytest.MonkeyPatch], None]


def after_loading(patch: pytest.MonkeyPatch, change: Callable[[Pipeline], None]) -> None:
    """Change the model between loading and running."""
    original = replay_mlx.load

    def load(*arguments: object) -> Pipeline:
        pipeline = original(*arguments)
        change(pipeline)
        return pipeline

    patch.setattr(replay_mlx, "load", load)


def positions(change: Callable[[np.ndarray, Sequence, int], np.ndarray]) -> Patch:
    """Change the position ids of both arms after they are built; `change` may also build its own."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        from lance_mlx.sequence import positions as module

        original = module.position_ids

        def changed(sequence: Sequence, tokens_per_second: int) -> np.ndarray:
            return change(original(sequence, tokens_per_second).copy(), sequence, tokens_per_second)

        patch.setattr(module, "position_ids", changed)
        patch.setattr(flow, "position_ids", changed)

    return apply


def noise_rows(sequence: Sequence) -> np.ndarray:
    return sequence.roles == Role.NOISE


def stride_one(ids: np.ndarray, sequence: Sequence, tokens_per_second: int) -> np.ndarray:
    block = np.flatnonzero(noise_rows(sequence))
    latents = block[1:-1]
    ids[0, latents] = ids[0, block[0]] + 1 + (ids[0, latents] - ids[0, block[0]] - 1) // tokens_per_second
    return ids


def origin_zero(ids: np.ndarray, sequence: Sequence, tokens_per_second: int) -> np.ndarray:
    latents = np.flatnonzero(noise_rows(sequence))[1:-1]
    ids[:, latents] -= ids[:, latents].min(axis=1, keepdims=True)
    return ids


def anchored(ids: np.ndarray, sequence: Sequence, tokens_per_second: int) -> np.ndarray:
    block = noise_rows(sequence)
    ids[0, block] += 2000 - ids[0, block][0]
    return ids


def guided_everywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flow, "is_guided", lambda t, request: request.guidance_scale > 1)


def renorm_by_channel(patch: pytest.MonkeyPatch) -> None:
    original = replay_mlx.request_from_bundle

    def changed(request: dict, entry: str, media: Path | None = None) -> Request:
        return original(request | {"cfg_renorm_type": Renorm.CHANNEL}, entry, media)

    patch.setattr(replay_mlx, "request_from_bundle", changed)


def recomputed_unconditional_ids(patch: pytest.MonkeyPatch) -> None:
    original = flow.unconditional_position_ids
    patch.setattr(flow, "unconditional_position_ids", lambda *given: original(*given[:2], Entry.FULL_SEQUENCE))


def wrong_experts_q_norm(patch: pytest.MonkeyPatch) -> None:
    def change(pipeline: Pipeline) -> None:
        attention = pipeline.model.language_model.model.layers[1].self_attn
        attention.q_norm_moe_gen.weight = attention.q_norm.weight

    after_loading(patch, change)


def hidden_vision_end(patch: pytest.MonkeyPatch) -> None:
    original = ScaledDotProductAttention.__call__

    def changed(module, queries: mx.array, kv: KeyValues, causal: bool) -> mx.array:
        plain = original(module, queries, kv, causal)
        if causal:
            return plain
        latents = original(module, queries[1:-1], KeyValues(kv.keys[:-1], kv.values[:-1]), causal)
        return mx.concatenate([plain[:1], latents, plain[-1:]])

    patch.setattr(ScaledDotProductAttention, "__call__", changed)


def exact_rope_frequencies(patch: pytest.MonkeyPatch) -> None:
    policy = Numerics("bfloat16", mx.bfloat16, round_rope_frequencies=False)
    patch.setattr(replay_mlx, "policy", lambda name: policy)


def first_chunk_through_the_temporal_convolution(patch: pytest.MonkeyPatch) -> None:
    original = Resample.__call__

    def changed(module: Resample, x: mx.array, state: StreamState) -> mx.array:
        first, state.first_chunk = state.first_chunk, False
        y = original(module, x, state)
        state.first_chunk = first
        return y[-1:] if first else y

    patch.setattr(Resample, "__call__", changed)


FAULTS = {
    "temporal stride 1": (positions(stride_one), "t2v-bf16-kv", "positions", "cond.step0/position_ids"),
    "grid origin 0": (positions(origin_zero), "t2i-fp32-kv", "positions", "cond.step0/position_ids"),
    "anchor 2000 on the target": (positions(anchored), "t2v-bf16-kv", "positions", "cond.step0/position_ids"),
    "guidance on every step": (guided_everywhere, "unguided end", "guidance", "sampler.x_t3"),
    "renorm channel": (renorm_by_channel, "t2i-fp32-kv", "guidance", "sampler.x_t1"),
    "unconditional ids recomputed": (
        recomputed_unconditional_ids,
        "t2i-fp32-kv",
        "positions",
        "uncond.prefix1/position_ids",
    ),
    "q_norm of the wrong expert": (
        wrong_experts_q_norm,
        "t2i-fp32-kv",
        "layers.1.self_attn.q_norm_moe_gen",
        "cond.step0/language_model.model.layers.1.self_attn.q_norm_moe_gen",
    ),
    "vision_end hidden from the latents": (
        hidden_vision_end,
        "t2i-fp32-kv",
        "layers.0.self_attn.sdpa",
        "cond.step0/language_model.model.layers.0.self_attn.sdpa",
    ),
    "exact RoPE frequencies": (
        exact_rope_frequencies,
        "t2v-bf16-kv",
        "layers.0.self_attn.q_rope",
        "cond.prefix0/language_model.model.layers.0.self_attn.q_rope",
    ),
    "first VAE chunk through the temporal convolution": (
        first_chunk_through_the_temporal_convolution,
        "t2i-fp32-kv",
        "vae.decoder.upsamples.0",
        "vae.decode.chunk0/decoder.upsamples.0",
    ),
}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory) -> Callable[[str], Path]:
    """Embedded bundles by name, and one whose last steps are not guided, recorded from the reference."""
    folder = tmp_path_factory.mktemp("oracles")
    shutil.copytree(ORACLES / "checkpoint-a", folder / "checkpoint-a")
    base = read_bundle(ORACLES / "t2i-fp32-kv")
    written = folder / "unguided end"
    manifest = dict(base.manifest)
    manifest |= {"name": written.name, "request": base.request | {"cfg_interval": [0.8, 1.0]}}
    write_bundle(written, manifest, base.inputs, base.taps)
    unguided = read_bundle(written)
    recording = load_run(unguided, reference.numerics.Numerics("float32")).record(wanted(unguided))
    taps = {name: recording[name] for name in base.taps if name in recording}
    write_bundle(written, manifest, base.inputs, taps)
    return lambda name: written if name == written.name else ORACLES / name


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "t2v-bf16-kv", "unguided end"])
def test_an_unbroken_model_agrees_with_the_bundles_that_catch_the_faults(bundles, name, alone):
    with alone() if name == "unguided end" else nullcontext():
        result = check_bundle(bundles(name), "mlx")
    assert (result.verdict, result.missing, result.first_divergence) == ("agree", [], None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_and_named(bundles, monkeypatch, fault):
    apply, bundle, component, tap = FAULTS[fault]
    apply(monkeypatch)
    result: Result = check_bundle(bundles(bundle), "mlx")
    assert result.verdict == "diverge"
    assert result.first_divergence["component"] == component
    assert result.first_divergence["tap"] == tap
