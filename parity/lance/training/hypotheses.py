"""What a port may do instead in training, tried by breaking the reference alike; laws read the rest from the data."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import reference.mot
import reference.training
from parity.hypotheses import Hypothesis
from parity.lance.training.bundle import TrainingBundle
from parity.laws.numbers import told
from parity.ports.attach import Attached
from reference.numerics import Linear

Wrapper = Callable[..., Any]


def wrapped(owner: Any, name: str, wrapper: Wrapper) -> Callable[[object], AbstractContextManager[None]]:
    """A patch that calls `wrapper(original, *arguments)` in a function's or method's place."""

    @contextmanager
    def broken(site: object) -> Any:
        with Attached() as attached:
            attached.wrap(owner, name, wrapper)
            yield

    return broken


def regraded(value: Tensor, other: Tensor) -> Tensor:
    """One array's value with another's gradient."""
    return other + (value - other).detach()


def _norm(original: Wrapper, module: Any, x: Tensor) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps).detach()
    return regraded(original(module, x), module.weight * (wide * scale).to(x.dtype))


def _unweighted(original: Wrapper, module: Any, x: Tensor) -> Tensor:
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps)).to(x.dtype)
    return regraded(original(module, x), normed + module.weight * normed.detach())


def _by_input(original: Wrapper, module: Any, x: Tensor) -> Tensor:
    return regraded(original(module, x), original(module, x.detach()) * 0 + module.weight * x)


def _onwards(original: Wrapper, module: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return regraded(original(module, x, cos, sin), original(module, x, cos, -sin))


def _unturned(original: Wrapper, module: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return regraded(original(module, x, cos, sin), x)


def _attend(weights_of: Callable[[Tensor], Tensor], shared: Callable[[Tensor, int], Tensor] | None = None) -> Wrapper:
    def attend(original: Wrapper, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        spread = shared or (lambda heads, groups: heads.repeat_interleave(groups, 1))
        keys, values = spread(k, groups), spread(v, groups)
        scores = torch.einsum("nhd,mhd->hnm", q.float(), keys.float()) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = torch.einsum("hnm,mhd->nhd", weights_of(scores), values.float())
        return regraded(original(module, q, k, v, mask), out.to(q.dtype))

    return attend


def _sum_constant(scores: Tensor) -> Tensor:
    exps = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return exps / exps.sum(-1, keepdim=True).detach()


def _one_of(index: int) -> Callable[[Tensor, int], Tensor]:
    def spread(heads: Tensor, groups: int) -> Tensor:
        several = torch.stack([heads if i == index else heads.detach() for i in range(groups)], 2)
        return several.flatten(1, 2)

    return spread


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def _gate(silu: Callable[[Tensor], Tensor]) -> Wrapper:
    def mlp(original: Wrapper, module: Any, x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(regraded(F.silu(gate) * up, silu(gate) * up))

    return mlp


def _target(change: Callable[[Tensor], Tensor]) -> Wrapper:
    return lambda original, model, samples, last, velocity: original(model, samples, last, change(velocity))


def _squared(original: Wrapper, *given: Any) -> Tensor:
    return original(*given).sqrt()


def _labels(change: Callable[[Tensor], Tensor]) -> Wrapper:
    """The cross entropy of other labels."""
    return lambda original, logits, targets, **values: original(logits, change(targets), **values)


def _smoothed(original: Wrapper, logits: Tensor, targets: Tensor, **values: Any) -> Tensor:
    return original(logits, targets, label_smoothing=0.1, **values)


def _rounded_inputs(original: Wrapper, module: Any, x: Tensor) -> Tensor:
    return regraded(original(module, x), original(module, x + (x.bfloat16().to(x.dtype) - x).detach()))


def _layer(around: Callable[[Tensor], Tensor], beside: Callable[[Tensor], Tensor]) -> Wrapper:
    """A layer whose stream goes around attention, and around the MLP, in other ways."""

    def layer(original: Wrapper, module: Any, x: Tensor, shared: Any) -> Tensor:
        normed = _MOT.by_expert(x, shared.gen, module.input_layernorm, module.input_layernorm_moe_gen)
        x = around(x) + module.self_attn(normed, shared)
        norms = module.post_attention_layernorm, module.post_attention_layernorm_moe_gen
        return beside(x) + _MOT.by_expert(_MOT.by_expert(x, shared.gen, *norms), shared.gen, module.mlp,
                                          module.mlp_moe_gen)  # fmt: skip

    return layer


def _clean_part(original: Wrapper, model: Any, samples: Any, last: Tensor, velocity: Tensor) -> Tensor:
    clean = torch.cat([each.reshape(-1, each.shape[-1]) for s in samples for each in s.latents]).to(velocity)
    return original(model, samples, last, velocity + clean)


def _negated_clean(original: Wrapper, model: Any, samples: Any, last: Tensor, velocity: Tensor) -> Tensor:
    clean = torch.cat([each.reshape(-1, each.shape[-1]) for s in samples for each in s.latents]).to(velocity)
    return original(model, samples, last, clean)


_MOT, _TRAINING = reference.mot, reference.training
_NORMS = ("*norm", "*norm_moe_gen")
_HELD: list[tuple[str, tuple[str, ...], Any, str, Wrapper]] = [
    ("the root mean square is taken as a constant", _NORMS, _MOT.RMSNorm, "forward", _norm),
    ("the weight is left out of the gradient", _NORMS, _MOT.RMSNorm, "forward", _unweighted),
    ("the weight's gradient is by what is not normed", _NORMS, _MOT.RMSNorm, "forward", _by_input),
    ("the gradient is turned onwards instead of back", ("*_rope",), _MOT.Rope, "forward", _onwards),
    ("the gradient is not turned back", ("*_rope",), _MOT.Rope, "forward", _unturned),
    ("the softmax's sum is taken as a constant", ("*.sdpa",), _MOT.Attend, "forward", _attend(_sum_constant)),
    ("of the heads that share keys the first alone counts", ("*.sdpa",), _MOT.Attend, "forward",
     _attend(_softmax, _one_of(0))),
    ("of the heads that share keys the last alone counts", ("*.sdpa",), _MOT.Attend, "forward",
     _attend(_softmax, _one_of(1))),
    ("SiLU passes its gradient on unchanged", ("*.activation",), _MOT.MLP, "forward", _gate(lambda x: x)),
    ("of SiLU's gradient the sigmoid alone is taken", ("*.activation",), _MOT.MLP, "forward",
     _gate(lambda x: x * torch.sigmoid(x).detach())),
    ("the target is negated", ("mse",), _TRAINING, "squared_errors", _target(lambda v: -v)),
    ("the target is the noise", ("mse",), _TRAINING, "squared_errors", _clean_part),
    ("the target is the clean latents", ("mse",), _TRAINING, "squared_errors", _negated_clean),
    ("the error is not squared", ("mse",), _TRAINING, "squared_errors", _squared),
    ("each label is the one before", ("ce",), _TRAINING.F, "cross_entropy", _labels(lambda t: t.roll(1))),
    ("each label is the one after", ("ce",), _TRAINING.F, "cross_entropy", _labels(lambda t: t.roll(-1))),
    ("labels are smoothed by 0.1", ("ce",), _TRAINING.F, "cross_entropy", _smoothed),
    ("inputs are rounded to bfloat16 for the weight's gradient", ("*proj*", "lm_head", "llm2vae", "vae2llm"), Linear,
     "forward", _rounded_inputs),
    ("the stream passes no gradient around attention", ("*residual",), _MOT.DecoderLayer, "forward",
     _layer(Tensor.detach, lambda x: x)),
    ("the stream passes no gradient around the MLP", ("*residual",), _MOT.DecoderLayer, "forward",
     _layer(lambda x: x, Tensor.detach)),
]  # fmt: skip
HYPOTHESES = [Hypothesis(name, about, wrapped(*where)) for name, about, *where in _HELD]
"""Tried beside the laws that are read from what was computed."""


def exact_hypotheses(bundle: TrainingBundle) -> list[Hypothesis]:
    """What integers, times and states of a pack may be instead."""
    shift = bundle.training["timestep_shift"]
    data = [latent.reshape(-1, latent.shape[-1]) for asked in bundle.samples for latent in asked.kept]
    noise = bundle.inputs["noise"].array if data else np.zeros(0, np.float32)

    def times(by: float) -> np.ndarray:
        with np.errstate(over="ignore"):
            t = (1 / (1 + np.exp(-bundle.inputs["timesteps_raw"].array.astype(np.float64)))).astype(np.float32)
        return np.float32(by) * t / (1 + np.float32(by - 1) * t)

    changes: list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = [
        ("each is the one before", "*", lambda ids: np.roll(ids, 1, -1)),
        ("each is the one after", "*", lambda ids: np.roll(ids, -1, -1)),
        ("they are not moved towards noise", "timesteps", lambda t: times(1.0)),
        ("they are moved towards data", "timesteps", lambda t: times(1 / shift)),
        ("they count from noise", "timesteps", lambda t: 1 - t),
        ("what is given has the target's time", "timesteps", lambda t: np.full_like(t, t.max(initial=0))),
        ("it is the data", "x_t", lambda x: np.concatenate(data)),
        ("it is the noise", "x_t", lambda x: noise),
        ("noise and data are exchanged", "x_t", lambda x: noise + np.concatenate(data) - x),
    ]
    return [Hypothesis(name, (about,), transform=lambda site, array, change=change: change(array))
            for name, about, change in changes]  # fmt: skip


def scaled(expected: np.ndarray, got: np.ndarray, what: str) -> list[Hypothesis]:
    """What is a constant times the right values, of which there are too few for laws to be read from."""
    square = float(np.vdot(expected, expected))
    if not square or expected.shape != got.shape:
        return []
    factor = float(np.vdot(expected, got)) / square
    ratio = Fraction(factor).limit_denominator(200)
    said = f" ({ratio})" if ratio.denominator > 1 and abs(ratio - factor) < 1e-5 * abs(factor) else ""
    words = "is 0" if not factor else f"is {told(factor)}{said} times as large"
    return [Hypothesis(f"{what} {words}", ("*",), transform=lambda site, array: array * np.float32(factor), size=1.0)]
