"""Hypotheses about parameters: each is tried on the weights as they were loaded, and in the modules that use them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis
from parity.lance.hypotheses.tools import (
    WEIGHTED,
    leaf,
    module_of,
    of_weight,
    parameters,
    submodule,
    twin_path,
)

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Change = Callable[["TapProbe", nn.Module, str, Tensor], Tensor | None]
"""Another value [same shape] of a module's parameter of that name; None leaves it as it is."""

PROJECTIONS = ("layers.*_proj", "layers.*_proj_moe_gen", "lm_head", "vae2llm", "llm2vae", "time_embedder*",
               "vit_model.*.qkv", "vit_model.*proj", "vit_model.merger*")  # fmt: skip
QUANTIZED = (*PROJECTIONS, "embed_tokens", "*norm*")
PER_LAYER = ("layers.*", "vit_model.blocks.*")
QK = ("layers.*.q_proj*", "layers.*.k_proj*")
QKV = ("vit_model.*.qkv", "vae.*.to_qkv")
VARIANTS = ("Lance_3B", "Lance_3B_Video")


def weights(name: str, components: tuple[str, ...], change: Change, loaded: bool = False) -> Hypothesis:
    """A hypothesis that the parameters of a module have other values; `loaded`: only as they were loaded."""

    @contextmanager
    def patch(site: "TapProbe") -> Iterator[None]:
        if of_weight(site):
            yield
            return
        if loaded:
            raise DoesNotApply
        module = leaf(module_of(site))
        with parameters(module, changed(site, module)):
            yield

    def changed(site: "TapProbe", module: nn.Module) -> dict[str, Tensor]:
        values = {}
        for key, value in module._parameters.items():
            new = None if value is None else change(site, module, key, value)
            if new is not None and new.shape == value.shape:
                values[key] = new
        if not values:
            raise DoesNotApply
        return values

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        if not of_weight(site):
            return array
        try:
            module = leaf(submodule(site, site.path))
            key = site.tap.name.rpartition(".")[2]
            own = module._parameters[key]
            new = change(site, module, key, torch.from_numpy(np.array(array)).to(own.dtype))
        except DoesNotApply:
            return None
        return None if new is None or tuple(new.shape) != array.shape else new.float().numpy()

    return Hypothesis(name, components, patch, transform)


def unrounded(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
    """A weight of which the policy's dtype holds the rounded values, before it was rounded."""
    if not of_weight(site):
        return array
    own = torch.from_numpy(np.array(site.got)).to(site.pipeline.numerics.torch_dtype).float().numpy()
    return site.got if own.shape == array.shape and np.array_equal(own, array) else None


def of_module(path: Callable[[str], str]) -> Change:
    """The parameters of another module; `path` makes its path of the own one's."""

    def change(site: "TapProbe", module: nn.Module, key: str, value: Tensor) -> Tensor | None:
        other = leaf(submodule(site, path(site.path)))
        if other is module:
            raise DoesNotApply
        return other._parameters.get(key)

    return change


def moved(by: int) -> Callable[[str], str]:
    """Path of the same module so many layers or blocks further on."""

    def path(own: str) -> str:
        parts = own.split(".")
        for i, part in enumerate(parts[1:], 1):
            if part.isdigit() and parts[i - 1] in ("layers", "blocks"):
                parts[i] = str(int(part) + by)
                return ".".join(parts)
        raise DoesNotApply

    return path


def named(name: str) -> Callable[[str], str]:
    """Path of the module of another name beside the own one, in the same expert."""

    def path(own: str) -> str:
        root, _, last = own.rpartition(".")
        suffix = "_moe_gen" if last.endswith("_moe_gen") else ""
        return f"{root}.{name}{suffix}"

    return path


def on(key: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    """A change of the parameter of that name alone."""
    return lambda site, module, own, value: change(value) if own == key else None


def each(change: Callable[[Tensor], Tensor | None]) -> Change:
    return lambda site, module, own, value: change(value)


def per_head(arrange: Callable[[Tensor], Tensor]) -> Change:
    """Rows of every head in another order: `arrange` is given [heads, head_dim, ...]."""

    def change(site: "TapProbe", module: nn.Module, key: str, value: Tensor) -> Tensor:
        heads = value.unflatten(0, (-1, site.pipeline.model.config.head_dim))
        return arrange(heads).reshape(value.shape)

    return change


def to_pairs(x: Tensor) -> Tensor:
    """(2, d / 2) -> (d / 2, 2): what makes neighbouring pairs of halves."""
    return x.unflatten(1, (2, -1)).transpose(1, 2)


def to_halves(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, 2)).transpose(1, 2)


def thirds(*order: int) -> Change:
    """Queries, keys and values of one product in another order."""
    return each(lambda value: value.unflatten(0, (3, -1))[list(order)].flatten(0, 1))


def head_by_head(site: "TapProbe", module: nn.Module, key: str, value: Tensor) -> Tensor:
    """Rows in the order (head, query key value, dim)."""
    if not site.component.startswith("vit_model"):
        raise DoesNotApply
    heads = site.pipeline.vit_model.config.num_heads
    return value.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(value.shape)


def quantized(bits: int, group: int, signed: bool = False, once: bool = False) -> Change:
    """Rows in groups, each with its own scale and offset (signed: scale alone); a vector is a row.

    The way back is rounded at every step, or `once` at its end.
    """

    def change(value: Tensor) -> Tensor | None:
        if value.ndim > 2 or value.shape[-1] % group:
            return None
        wide = value.float().unflatten(-1, (-1, group))
        levels = 2**bits - 1
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        if signed:
            step = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (levels // 2)
            return ((wide / step).round() * step).flatten(-2).to(value.dtype)
        # The end that is farther from 0 is met exactly, as MLX's affine quantization has it.
        step = ((high - low) / levels).clamp(min=1e-7)
        outer = torch.where(low.abs() > high.abs(), low, high)
        step = torch.where(low.abs() > high.abs(), step, -step)
        turns = (outer / step).round()
        step = torch.where(turns != 0, outer / turns, step)
        offset = torch.where(turns != 0, outer, torch.zeros_like(outer))
        codes = ((wide - offset) / step).round().clamp(0, levels)
        # Scale and offset are kept in the weight's dtype.
        parts = [each.to(value.dtype) for each in (codes, step, offset)]
        codes, step, offset = [each.float() for each in parts] if once else parts
        return (codes * step + offset).flatten(-2).to(value.dtype)

    return on("weight", change)


def tied(site: "TapProbe", module: nn.Module, key: str, value: Tensor) -> Tensor:
    model = site.pipeline.model.language_model
    return model.model.embed_tokens.weight if module is model.lm_head else model.lm_head.weight


def of_file(folder: Callable[["TapProbe"], list[str]], prefix: str = "") -> Change:
    """The parameter as another file of the checkpoint holds it."""

    def change(site: "TapProbe", module: nn.Module, key: str, value: Tensor) -> Tensor:
        name = f"{site.path}.{key}"
        if prefix and not name.startswith(prefix):
            raise DoesNotApply
        for file in folder(site):
            path = site.pipeline.checkpoint / file
            if path.is_file():
                with safe_open(path, framework="pt", device="cpu") as tensors:
                    if name.removeprefix(prefix) in tensors.keys():
                        return tensors.get_tensor(name.removeprefix(prefix)).to(value.dtype)
        raise DoesNotApply

    return change


def other_variant(site: "TapProbe") -> list[str]:
    return [f"{variant}/model.safetensors" for variant in VARIANTS if variant != site.pipeline.variant]


def vit_file(site: "TapProbe") -> list[str]:
    return ["Qwen2.5-VL-ViT/vit.safetensors"]


def other_half(own: str) -> str:
    """Path of the other of an MLP's two inner projections."""
    return own.replace("gate_proj", "up_proj") if own.endswith("gate_proj") else own.replace("up_proj", "gate_proj")


SIBLINGS = {
    "q_proj": ("layers.*.k_proj*", "layers.*.o_proj*"),
    "k_proj": ("layers.*.q_proj*", "layers.*.v_proj*"),
    "v_proj": ("layers.*.q_proj*", "layers.*.k_proj*"),
    "q_norm": ("layers.*.k_norm*",),
    "k_norm": ("layers.*.q_norm*",),
    "input_layernorm": ("layers.*.post_attention_layernorm*",),
    "post_attention_layernorm": ("layers.*.input_layernorm*",),
    "norm1": ("vit_model.*.norm2",),
    "norm2": ("vit_model.*.norm1",),
}
HYPOTHESES = [
    weights("the other expert's weight", ("layers.*", "norm*"), of_module(twin_path), loaded=True),
    weights("the next layer's weight", PER_LAYER, of_module(moved(1))),
    weights("the previous layer's weight", PER_LAYER, of_module(moved(-1))),
    *(weights(f"the weight of {name}", components, of_module(named(name))) for name, components in SIBLINGS.items()),
    weights("gate and up are exchanged", ("*.gate_proj", "*.up_proj"), of_module(other_half)),
    weights("the weight's rows are permuted for interleaved RoPE", QK, per_head(to_pairs)),
    weights("the weight's rows are permuted for RoPE in halves", QK, per_head(to_halves)),
    Hypothesis("the weight is kept in float32", WEIGHTED, transform=unrounded),
    *(weights(f"the weight is quantized to {bits} bits in groups of {group}", QUANTIZED, quantized(bits, group))
      for bits in (8, 4) for group in (32, 64, 128)),
    weights("the weight is quantized to 8 bits row by row", PROJECTIONS, on(
        "weight", lambda value: quantized(8, value.shape[-1], signed=True)(None, None, "weight", value))),
    weights("queries and keys of qkv are exchanged", QKV, thirds(1, 0, 2)),
    weights("keys and values of qkv are exchanged", QKV, thirds(0, 2, 1)),
    weights("queries and values of qkv are exchanged", QKV, thirds(2, 1, 0)),
    weights("qkv is stored head by head", QKV, head_by_head),
    weights("the head is tied to the token embeddings", ("lm_head", "embed_tokens"), tied),
    weights("the weight is the other variant's", WEIGHTED, of_file(other_variant)),
    weights("the weight is the vision tower's own file's", ("vit_model.*",), of_file(vit_file, "vit_model.")),
]  # fmt: skip
