"""Attention and the rotation before it: what each is given, and what is known of its tokens."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import reference.mot
import reference.vae_layers
import reference.vit
from parity.hypotheses.base import DoesNotApply, recomputed
from parity.lance.components.base import Known, array_of, called_with, given_to, own_rows, parameter
from parity.lance.hypotheses.tokens import arm_splits, by_expert, calls_of, pass_tokens
from parity.lance.hypotheses.tools import around, parent_of, submodule
from parity.lance.hypotheses.vision import windows_of
from parity.lance.hypotheses.vision_attention import gathered_by_window, places_of
from reference.layout import MERGE

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Given = tuple[dict[str, np.ndarray], dict[str, Any]]


def rotary(site: "TapProbe") -> Given:
    """x [n, heads, d], cos and sin [n, d / 2], position_ids [axes, n]; theta, axes [d / 2] that each pair follows."""
    module, given = given_to(site)
    if not isinstance(module, reference.mot.Rope):
        raise DoesNotApply
    x, cos, sin = (own_rows(site, array) for array in given[:3])
    half = x.shape[-1] // 2
    inputs = {"x": x, "cos": cos[:, :half], "sin": sin[:, :half]}
    ids = site.near("position_ids")
    if ids is not None and ids.shape[1] == len(x):
        inputs["position_ids"] = ids
    config = site.pipeline.model.config
    axes = np.repeat(np.arange(len(config.mrope_section)), config.mrope_section)
    return inputs, {"theta": config.rope_theta, "axes": axes, "axis_names": "thw"}


def vision_rotary(site: "TapProbe") -> Given:
    """As `rotary`, of patches by row and column, each with half of the pairs and with the same frequencies."""
    _, (x, cos, sin) = given_to(site)
    half = x.shape[-1] // 2
    ids = gathered_by_window(site, places_of(site)).T
    inputs = {"x": x, "cos": cos[:, :half], "sin": sin[:, :half], "position_ids": array_of(ids)}
    exponents = np.tile(np.arange(half // 2) / (half // 2), 2)
    axes = np.repeat(np.arange(2), half // 2)
    return inputs, {"theta": reference.vit.ROPE_THETA, "exponents": exponents, "axes": axes, "axis_names": "hw"}


def attention(site: "TapProbe") -> Given:
    """q [n, h, d], k and v [m, kv, d], mask bool [n, m]; which key each query is, labels and rotation of the keys."""
    module, (q, k, v, mask) = given_to(site)
    if not isinstance(module, reference.mot.Attend):
        raise DoesNotApply
    mask = np.ones((len(q), len(k)), bool) if mask is None else mask
    places = np.arange(len(k) - len(q), len(k), dtype=np.int32)
    q, mask, places = (own_rows(site, array) for array in (q, mask, places))
    inputs = {"q": q, "k": k, "v": v, "mask": mask}
    facts: dict[str, Any] = {"places": places, "labels": _labels(site, len(k)), "others": {}}
    own = _rotation(site, k)
    if own is not None:
        facts["cos"], facts["sin"] = own
    facts["others"] = {name: other for name, other in _others(site, inputs) if other is not None}
    return inputs, facts


def _labels(site: "TapProbe", keys: int) -> dict[str, np.ndarray]:
    """The segment of each key, and its latent frame; -1 where it has none."""
    frames = []
    for split in arm_splits(site):
        label = np.full(split.length, -1)
        if split.grid is not None:
            cells = split.grid.rows * split.grid.columns
            label[1:-1] = np.arange(split.length - 2) // cells + (max(frames[-1]) + 1 if frames else 0)
        frames.append(label)
    frame = np.concatenate(frames)[:keys]
    return {
        "segment": pass_tokens(site).call[:keys],
        "frame": np.pad(frame, (0, keys - len(frame)), constant_values=-1),
    }


def _rotation(site: "TapProbe", k: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """cos and sin [m, d / 2] that the keys were turned by; what comes after the site's call is not turned."""
    parts = [site.value(f"{call}/position_ids") for call, _ in _calls(site)]
    if any(part is None for part in parts):
        return None
    half = k.shape[-1] // 2
    turned = site.pipeline.model.language_model.rotation(torch.from_numpy(np.concatenate(parts, 1).astype(np.int32)))
    cos, sin = (array_of(each)[: len(k), :half] for each in turned)
    more = len(k) - len(cos)
    return np.pad(cos, ((0, more), (0, 0)), constant_values=1), np.pad(sin, ((0, more), (0, 0)))


def _calls(site: "TapProbe") -> list[tuple[str, slice]]:
    """The calls up to the site's own, and the tokens of each."""
    calls = calls_of(site)
    names = [call for call, _ in calls]
    if site.tap.call not in names:
        raise DoesNotApply
    return calls[: names.index(site.tap.call) + 1]


Other = tuple[np.ndarray, np.ndarray, np.ndarray]


def _others(site: "TapProbe", inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, Other | None]]:
    """Keys, values and mask of other layers, of the other arm and of earlier steps, by what they are called."""
    k, v, mask = inputs["k"], inputs["v"], inputs["mask"]
    layer, step, calls = site.tap.numbers["layer"], site.tap.numbers.get("step", 0), _calls(site)
    root = site.path.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0]
    count = calls[-1][1].start

    def known(calls: list[tuple[str, slice]], layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        path, keys, values = f"{root}.{layer}.self_attn", [], []
        for call, _ in calls:
            part = site.value(f"{call}/{path}.k_rope")
            if part is None:
                return None
            gen = np.zeros(len(part), bool)
            gen[1:-1] = site.value(f"{call}/{path}.v_proj_moe_gen") is not None
            try:
                values.append(by_expert(site, call, f"{path}.v_proj", gen).reshape(len(part), *v.shape[1:]))
            except (DoesNotApply, ValueError):
                return None
            keys.append(part)
        return np.concatenate(keys), np.concatenate(values)

    def followed(first: tuple[np.ndarray, np.ndarray] | None, start: int) -> Other | None:
        """Other keys and values, and this pass's own from `start` on, of which the former are all seen."""
        if first is None:
            return None
        seen = mask[:, :start] if len(first[0]) == start else np.ones((len(mask), len(first[0])), bool)
        keys, values = (np.concatenate(pair) for pair in ((first[0], k[start:]), (first[1], v[start:])))
        return keys, values, np.hstack([seen, mask[:, start:]])

    layers = len(submodule(site, root))
    for other in sorted({layer - 1, layer + 1, 0, layers - 1} & set(range(layers)) - {layer}):
        yield f"layer {other}", followed(known(calls, other), calls[-1][1].stop)
        if count:
            yield f"layer {other} before this pass", followed(known(calls[:-1], other), count)
    if count:
        arm = "uncond" if site.tap.arm == "cond" else "cond"
        if site.tap.arm and site.layout.answer is None:
            yield "the other guidance arm before this pass", followed(known(calls_of(site, arm)[:-1], layer), count)
        name = calls[-1][0].removesuffix(str(step))
        for other in sorted({0, step - 1} & set(range(step))) if ".step" in site.tap.call else ():
            stale = known([(f"{name}{other}", calls[-1][1])], layer)
            if stale is not None:
                keys, values = (
                    np.concatenate([x[:count], y, x[count + len(y) :]]) for x, y in zip((k, v), stale, strict=True)
                )
                yield f"step {other}", (keys, values, mask)


def vision_attention(site: "TapProbe") -> Given:
    """q, k, v [n, h, d], mask [n, n]; weight and bias behind it, labels of the patches, and what RoPE was given."""
    parent = parent_of(site)
    if not isinstance(parent, reference.vit.Attention):
        raise DoesNotApply
    turned: list[tuple] = []
    handle = parent.k_rope.register_forward_pre_hook(lambda module, args: turned.append(args) and None)
    try:
        seen, _ = _seen(site, reference.vit)
    finally:
        handle.remove()
    q, k, v, mask = (array_of(value) for value in seen[-1][:4])
    facts = {"weight": parameter(parent.proj, "weight"), "bias": parameter(parent.proj, "bias")}
    tokens, windows, frames = windows_of(site)
    labels = {"window": windows, "frame": frames}
    facts["labels"] = {name: array_of(ids.repeat_interleave(MERGE**2)) for name, ids in labels.items()}
    facts["places"] = np.arange(len(q), dtype=np.int32)
    if turned:
        facts["cos"], facts["sin"] = (array_of(table)[:, : q.shape[-1] // 2] for table in turned[-1][1:3])
    _, (x, *_) = called_with(site)
    return {"x": x, "q": q, "k": k, "v": v, "mask": mask}, facts


def coder_attention(site: "TapProbe") -> Given:
    """q, k, v [cells of all frames, 1, c], mask of what is in one frame; weight and bias behind it, and x beside it."""
    block = parent_of(site) if site.component.endswith(".proj") else site.module
    if not isinstance(block, reference.vae_layers.AttentionBlock):
        raise DoesNotApply
    frames, x = _seen(site, reference.vae_layers, block)
    q, k, v = (np.concatenate([array_of(frame[i]) for frame in frames]) for i in range(3))
    frame = np.repeat(np.arange(len(frames)), len(q) // len(frames)).astype(np.int32)
    facts = {
        "weight": parameter(block.proj, "weight").reshape(v.shape[-1], -1),
        "bias": parameter(block.proj, "bias"),
        "beside": x.reshape(x.shape[1], -1).T,
        "labels": {"frame": frame},
        "places": np.arange(len(q), dtype=np.int32),
    }
    return {"q": q, "k": k, "v": v, "mask": frame[:, None] == frame}, facts


def _seen(site: "TapProbe", owner: ModuleType, block: nn.Module | None = None) -> tuple[list[tuple], np.ndarray | None]:
    """What a file's `attend` is given when the site is computed, call by call, and what its block is given."""
    calls, inputs, handles = [], [], []

    def attend(original: Callable[..., Tensor], *given: Any) -> Tensor:
        calls.append(given)
        return original(*given)

    if block is not None:
        handles.append(block.register_forward_pre_hook(lambda module, args: (calls.clear(), inputs.append(args[0]))[0]))
    try:
        with around(owner, "attend", attend):
            recomputed(site)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise DoesNotApply
    return calls, array_of(inputs[-1]) if inputs else None


KNOWN = (
    Known("rotary", ("layers.*.self_attn.?_rope",), rotary),
    Known("rotary", ("vit_model.blocks.*.attn.?_rope",), vision_rotary),
    Known("attention", ("layers.*.self_attn.sdpa",), attention),
    # A product with a weight, of which more is known.
    Known("linear", ("vit_model.blocks.*.attn.proj",), vision_attention),
    Known("attention", ("vae.*.middle.1", "vae.*.middle.1.proj"), coder_attention),
)
