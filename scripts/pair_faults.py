"""Mistakes of ports of language models, put into mlx-lm's: contexts that break a port for as long as they last."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Break = Callable[[Any, Any], AbstractContextManager[None]]
"""Given a port and its module."""


@dataclass(frozen=True)
class Fault:
    """A mistake.

    Attributes:
        component, says: regular expressions that the first finding's component and its explanation are to match.
        models: those that it is put into.
    """

    name: str
    component: str
    says: str
    models: tuple[str, ...]
    breaks: Break


@contextmanager
def _patched(owner: Any, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    held = getattr(owner, name)
    setattr(owner, name, make(held))
    try:
        yield
    finally:
        setattr(owner, name, held)


def _layers(change: Callable[[Any], None]) -> Break:
    @contextmanager
    def breaks(port: Any, module: Any) -> Iterator[None]:
        for layer in port.model.layers:
            change(layer)
        yield

    return breaks


def _rope(**values: Any) -> Break:
    def change(layer: Any) -> None:
        for name, value in values.items():
            setattr(layer.self_attn.rope, name, value)

    return _layers(change)


class _Turned(nn.Module):
    def __init__(self, rope: Any, turn: Callable[[Any, mx.array, int], mx.array]) -> None:
        super().__init__()
        self.rope, self.turn = rope, turn

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return self.turn(self.rope, x, offset)


def _turned(turn: Callable[[Any, mx.array, int], mx.array], only: slice = slice(None)) -> Break:
    @contextmanager
    def breaks(port: Any, module: Any) -> Iterator[None]:
        for layer in port.model.layers[only]:
            layer.self_attn.rope = _Turned(layer.self_attn.rope, turn)
        yield

    return breaks


def _attend(change: Callable[..., tuple]) -> Break:
    def make(held: Callable) -> Callable:
        def attend(q: Any, k: Any, v: Any, cache: Any = None, scale: float = 1.0, mask: Any = None, **more: Any) -> Any:
            q, k, v, scale, mask = change(q, k, v, scale, mask)
            return held(q, k, v, cache=cache, scale=scale, mask=mask, **more)

        return attend

    return lambda port, module: _patched(module, "scaled_dot_product_attention", make)


def _mask(seen: Callable[[mx.array, mx.array], mx.array]) -> Break:
    def change(q: Any, k: Any, v: Any, scale: float, mask: Any) -> tuple:
        rows, columns = mx.arange(q.shape[2])[:, None], mx.arange(k.shape[2])[None]
        return q, k, v, scale, seen(rows, columns)

    return _attend(change)


def _method(kind: str, instead: Callable[..., Any]) -> Break:
    """Calls of a class of the port's module, or of mlx.nn, are `instead(original, self, ...)`."""

    def breaks(port: Any, module: Any) -> AbstractContextManager[None]:
        owner = getattr(module, kind, None) or getattr(nn, kind)
        return _patched(
            owner, "__call__", lambda held: lambda self, *args, **values: instead(held, self, *args, **values)
        )

    return breaks


def _weight(path: str, change: Callable[[mx.array], mx.array]) -> Break:
    @contextmanager
    def breaks(port: Any, module: Any) -> Iterator[None]:
        port.load_weights([(path, change(dict(tree_flatten(port.parameters()))[path]))], strict=False)
        yield

    return breaks


def _head(x: mx.array, head: int, factor: float) -> mx.array:
    scale = mx.ones((x.shape[1], 1, 1)).astype(x.dtype)
    scale[head] = factor
    return x * scale


def _block(after: Callable[[Any, Any, Any, Any], Any]) -> Break:
    return _method("TransformerBlock", lambda held, self, x, mask=None, cache=None: after(self, x, mask, cache))


def _fed(self: Any, h: mx.array) -> mx.array:
    return h + self.mlp(self.post_attention_layernorm(h))


def _swiglu(make: Callable[[mx.array, mx.array], mx.array]) -> Break:
    return _method("MLP", lambda held, self, x: self.down_proj(make(self.gate_proj(x), self.up_proj(x))))


def _one_bias(layer: Any) -> None:
    layer.self_attn.k_proj.pop("bias")


QKV = r"self_attn\.sdpa \([qk]\)"
SDPA = r"self_attn\.sdpa$"
NORM = "input_layernorm"
ROPES = ("llama", "qwen2", "qwen3")
PLAIN = ("llama", "qwen2")
PARTIAL = ("stablelm", "glm4")
FAULTS = (
    Fault("theta of another model", QKV, "theta is 10000", ROPES, _rope(base=1e4)),
    Fault("neighbouring channels turned", QKV, "neighbouring channels", ROPES, _rope(traditional=True)),
    Fault("halves turned", QKV, "half of them apart", ("glm4",), _rope(traditional=False)),
    Fault("neighbouring channels turned", QKV, "neighbouring channels", ("stablelm",), _rope(traditional=True)),
    Fault("all channels turned", QKV, "16 channels are turned", PARTIAL, _rope(dims=16)),
    Fault("theta of another model where some turn", QKV, "theta is (1000000|1e6)", PARTIAL, _rope(base=1e6)),
    Fault("positions halved", QKV, "0.5 times as large", ROPES, _rope(scale=0.5)),
    Fault("half of the channels turned", QKV, "8 channels", ROPES, _rope(dims=8)),
    Fault("not turned", QKV, "nothing is turned", ROPES, _turned(lambda rope, x, offset: x)),
    Fault("not turned in layer 1", QKV, "nothing is turned", PLAIN, _turned(lambda rope, x, offset: x, slice(1, 2))),
    Fault("queries one position ahead", QKV, r"off by \+1", PLAIN,
          _turned(lambda rope, x, offset: rope(x, offset=offset + (x.shape[1] == 4)))),
    Fault("scores not scaled", SDPA, "4 times as large", ROPES, _attend(lambda q, k, v, s, m: (q, k, v, 1.0, m))),
    Fault("scores scaled twice", SDPA, "0.25 times", ROPES, _attend(lambda q, k, v, s, m: (q, k, v, s * s, m))),
    Fault("no mask", SDPA, "every key is seen", ROPES, _attend(lambda q, k, v, s, m: (q, k, v, s, None))),
    Fault("a window of 8", SDPA, "more than 7 tokens back", ROPES, _mask(lambda i, j: (j <= i) & (j > i - 8))),
    Fault("the next key seen", SDPA, "the key after it", PLAIN, _mask(lambda i, j: j <= i + 1)),
    Fault("the first key hidden", SDPA, "the first (1 )?key", PLAIN,
          _mask(lambda i, j: (j <= i) & ((j > 0) | (i == 0)))),
    Fault("keys and values exchanged", r"sdpa \(k\)", r"sdpa \(v\)", PLAIN,
          _attend(lambda q, k, v, s, m: (q, v, k, s, m))),
    Fault("head 2 off by a hundredth", r"sdpa \(q\)", "head 2", PLAIN,
          _attend(lambda q, k, v, s, m: (_head(q, 2, 1.01), k, v, s, m))),
    Fault("a bias left out", r"k_proj", "bias is missing", ("qwen2",), _layers(_one_bias)),
    Fault("gate and up exchanged", r"down_proj \(input\)", "exchanged", PLAIN, _swiglu(lambda g, u: nn.silu(u) * g)),
    Fault("GELU in place of SiLU", r"down_proj \(input\)", "GELU", PLAIN, _swiglu(lambda g, u: nn.gelu(g) * u)),
    Fault("SiLU with beta 1.2", r"down_proj \(input\)", "beta 1.2", PLAIN,
          _swiglu(lambda g, u: g * mx.sigmoid(1.2 * g) * u)),
    # SiLU of 0.7388 is one half.
    Fault("the gate clamped at one half", r"down_proj \(input\)", "at most 0.5|at most 0.7388", PLAIN,
          _swiglu(lambda g, u: mx.minimum(nn.silu(g), 0.5) * u)),
    Fault("eps of 1e-3", NORM, "eps is 0.001", ROPES, _layers(lambda layer: setattr(layer[NORM], "eps", 1e-3))),
    Fault("the weight counts from 1", NORM, "counts from 1", PLAIN,
          _method("RMSNorm", lambda held, self, x: mx.fast.rms_norm(x, self.weight + 1, self.eps))),
    Fault("the mean subtracted", NORM, "mean is subtracted", PLAIN,
          _method("RMSNorm", lambda held, self, x: mx.fast.layer_norm(x, self.weight, None, self.eps))),
    Fault("a norm without its weight", NORM, "weight is missing", PLAIN,
          _method("RMSNorm", lambda held, self, x: mx.fast.rms_norm(x, None, self.eps))),
    Fault("a residual left out", r"post_attention_layernorm \(input\)", "self_attn is in its place", PLAIN,
          _block(lambda s, x, m, c: _fed(s, s.self_attn(s.input_layernorm(x), m, c)))),
    Fault("the residual behind the norm", r"post_attention_layernorm \(input\)", "input_layernorm is added", PLAIN,
          _block(lambda s, x, m, c: _fed(s, s.input_layernorm(x) + s.self_attn(s.input_layernorm(x), m, c)))),
    Fault("half of what the MLP adds", r"layers\.0$", "0.5 times", PLAIN,
          _block(lambda s, x, m, c: (lambda h: h + 0.5 * s.mlp(s.post_attention_layernorm(h)))(
              x + s.self_attn(s.input_layernorm(x), m, c)))),
    Fault("normed twice", r"self_attn \(input\)", "another call of input_layernorm", PLAIN,
          _block(lambda s, x, m, c: _fed(s, x + s.self_attn(s.input_layernorm(s.input_layernorm(x)), m, c)))),
    Fault("the other norm before the MLP", r"mlp \(input\)", "another call of input_layernorm", PLAIN,
          _block(lambda s, x, m, c: (lambda h: h + s.mlp(s.input_layernorm(h)))(
              x + s.self_attn(s.input_layernorm(x), m, c)))),
    # In bfloat16 1.05 is 1.047.
    Fault("a weight off by a twentieth", r"layers\.1\.mlp\.up_proj", r"1\.0(5|47) times", PLAIN,
          _weight("model.layers.1.mlp.up_proj.weight", lambda w: w * 1.05)),
    Fault("a weight transposed", r"layers\.1\.self_attn\.q_proj", "transposed", PLAIN,
          _weight("model.layers.1.self_attn.q_proj.weight", lambda w: w.T)),
    Fault("rows of a projection interleaved", r"layers\.1\.self_attn\.k_proj", "2 x 8 transposed", PLAIN,
          _weight("model.layers.1.self_attn.k_proj.weight",
                  lambda w: w.reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64))),
)  # fmt: skip
