"""Faults of quantized weights: how they are packed and unpacked, which are, and dtypes that are taken from them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.model.quantized import Scheme, _codes
from lance_mlx.sampling import flow
from parity.errors import ParityError
from parity.lance.faults.base import DRAWS, Fault, Need, Patch, Target, parameter, replaced, wrapped
from parity.lance.faults.weights import weight
from parity.lance.packed import packed_beside
from parity.lance.weights_mlx import packed_modules

_NONE = "this fault breaks packed weights, and there are none: add --quantize"
PACKED = Need("a quantized checkpoint", lambda bundle: packed_beside(bundle.checkpoint, bundle.variant) is not None)


def _unsigned(original: Callable, noise: mx.array, clean: mx.array | None) -> mx.array:
    """Noise as an unsigned integer holds it, what is below 0 as 0."""
    return original(mx.maximum(noise, 0).astype(mx.uint32).astype(noise.dtype), clean)


def _packed(component: str, change: Callable[[nn.Module], Mapping[str, mx.array]]) -> Patch:
    """Give one packed module other arrays, or another scheme."""

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        module = target.modules(component)[component]
        _require(module)
        with _given(module, change(module)):
            yield

    return patch


def _require(module: nn.Module) -> None:
    if "scales" not in module:
        raise ParityError(_NONE)


@contextmanager
def _given(module: nn.Module, arrays: Mapping[str, mx.array], scheme: Scheme | None = None) -> Iterator[None]:
    with ExitStack() as stack:
        for name, array in arrays.items():
            stack.enter_context(parameter(module, name, array))
        if scheme is not None:
            stack.enter_context(replaced(module, "scheme", scheme))
        yield


class _DownColumns(Scheme):
    """Takes scales and biases for those of groups that run down the columns."""

    def dequantize(self, packed: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """See Scheme.dequantize; the rows must part into groups."""
        codes = _codes(packed["weight"], self.bits).astype(mx.float32)
        scales, biases = (
            mx.repeat(packed[name].astype(mx.float32).reshape(-1, codes.shape[1]), self.group_size, axis=0)
            for name in ("scales", "biases")
        )
        return (codes * scales + biases).astype(dtype)


def _groups_down_columns(component: str) -> Patch:
    def patch(target: Target) -> AbstractContextManager[None]:
        module = target.modules(component)[component]
        _require(module)
        return replaced(module, "scheme", _DownColumns(**asdict(module.scheme)))

    return patch


def _halves_exchanged(module: nn.Module) -> dict[str, mx.array]:
    low = mx.array(0x0F0F0F0F, mx.uint32)
    return {"weight": (module.weight & low) << 4 | (module.weight >> 4) & low}


def _bytes_reversed(module: nn.Module) -> dict[str, mx.array]:
    octets = module.weight.view(mx.uint8).reshape(len(module.weight), -1, 4)
    return {"weight": mx.contiguous(octets[..., ::-1]).reshape(len(module.weight), -1).view(mx.uint32)}


@contextmanager
def _towers_exchanged(target: Target) -> Iterator[None]:
    """Quantize the weights of each tower once more, as the recipe says of the other one's."""
    modules = packed_modules(target.model)
    if not modules:
        raise ParityError(_NONE)
    with ExitStack() as stack:
        made = []
        for path, module in modules.items():
            twin = modules.get(_twin(path))
            if twin is not None and twin.scheme != module.scheme:
                arrays = twin.scheme.quantize(module.scheme.dequantize(module, module.dtype))
                made.append((module, arrays, twin.scheme))
        for each in made:
            stack.enter_context(_given(*each))
        yield


def _twin(path: str) -> str:
    if "_moe_gen" in path:
        return path.replace("_moe_gen", "")
    return path.replace(".mlp.", ".mlp_moe_gen.") if ".mlp." in path else f"{path}_moe_gen"


def _quantized(bits: int, group: int) -> Callable[[Target, str, mx.array], mx.array]:
    def change(target: Target, component: str, array: mx.array) -> mx.array:
        packed = mx.quantize(array.reshape(-1, array.shape[-1]), group, bits)
        return mx.dequantize(*packed, group, bits).astype(array.dtype).reshape(array.shape)

    return change


def _fault(name: str, component: str, explanation: str, patch: Patch, about: str) -> Fault:
    return Fault(name, about, component, patch, explanation=explanation, needs=PACKED)


_BIAS, _SCALE, _GROUPS = "layers.1.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.gate_proj"
_HALVES, _BYTES = "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"
FAULTS = [
    Fault(
        "noise-cast-to-uint32",
        "The noise is cast to the dtype of the embeddings' weight, which is uint32 once that is packed.",
        "noise",
        lambda target: wrapped(flow, "initial_state", _unsigned),
        DRAWS,
        explanation="the noise is cast to an unsigned integer",
    ),
    _fault(
        "quantization-bias-dropped",
        _BIAS,
        "the quantization has no biases",
        _packed(_BIAS, lambda module: {"biases": mx.zeros_like(module.biases)}),
        "Codes are multiplied with their scale, and no bias is added.",
    ),
    _fault(
        "quantization-scales-and-biases-exchanged",
        _SCALE,
        "scales and biases of the quantization are exchanged",
        _packed(_SCALE, lambda module: {"scales": module.biases, "biases": module.scales}),
        "Scales are taken for biases, and biases for scales.",
    ),
    _fault(
        "quantization-groups-down-the-columns",
        _GROUPS,
        "the quantization's groups run down the columns",
        _groups_down_columns(_GROUPS),
        "Groups of weights that share a scale run down the columns instead of along the rows.",
    ),
    _fault(
        "quantization-nibbles-exchanged",
        _HALVES,
        "the halves of each byte of codes are exchanged",
        _packed(_HALVES, _halves_exchanged),
        "Of two codes of four bits in a byte the higher one is taken for the first.",
    ),
    _fault(
        "quantization-bytes-reversed",
        _BYTES,
        "the bytes of each word of codes are in reverse",
        _packed(_BYTES, _bytes_reversed),
        "The bytes of packed words are read from the highest to the lowest.",
    ),
    _fault(
        "recipe-of-the-other-tower",
        "layers.*_proj*",
        "the weight is quantized as the recipe says of the other tower",
        _towers_exchanged,
        "Each tower's weights are quantized as the recipe says of the other tower's.",
    ),
    Fault(
        "norm-quantized",
        "A norm's scale was quantized with the weights, to 8 bits in groups of 32.",
        "layers.1.post_attention_layernorm",
        weight(_quantized(8, 32), "layers.1.post_attention_layernorm"),
        explanation="the weight is quantized to 8 bits in groups of 32, zero kept",
    ),
    Fault(
        "embeddings-quantized",
        "The token embeddings were quantized with the weights, to 4 bits in groups of 32.",
        "embed_tokens",
        weight(_quantized(4, 32), "embed_tokens"),
        explanation="the weight is quantized to 4 bits in groups of 32, zero kept",
    ),
]
