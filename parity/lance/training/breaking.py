"""How faults of training break lance_mlx: each gives a patch, a context in which one piece does something else."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from lance_mlx.model import mot
from lance_mlx.model.layers import MLP, Linear, silu
from lance_mlx.model.mot import ExpertRows, KeyValues, LayerInput, MoTDecoderLayer, ScaledDotProductAttention
from lance_mlx.model.rope import Rotary
from lance_mlx.training import checkpointing, loss, pack, parts, step
from parity.lance.faults.base import everywhere, replaced, wrapped

stop = mx.stop_gradient


def regraded(value: mx.array, other: mx.array) -> mx.array:
    """One array's value with another's gradient."""
    return other + stop(value - other)


def times(x: mx.array, factor: float) -> mx.array:
    return regraded(x, factor * x)


def norm(change: Callable[[mx.array, mx.array, mx.array], mx.array]) -> Callable[[], AbstractContextManager[object]]:
    """`change(weight, x, 1 / rms)` says what the gradient is of."""

    def call(original: Callable, module: nn.RMSNorm, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        scale = mx.rsqrt(wide.square().mean(-1, keepdims=True) + module.eps)
        return regraded(original(module, x), change(module.weight, wide, scale).astype(x.dtype))

    return lambda: wrapped(nn.RMSNorm, "__call__", call)


def turned(by: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]) -> Any:
    def call(original: Callable, module: Rotary, x: mx.array, table: Any) -> mx.array:
        first, second = mx.split(x, 2, axis=-1)
        return regraded(original(module, x, table), mx.concatenate(by(first, second, table), -1).astype(x.dtype))

    return lambda: wrapped(Rotary, "__call__", call)


def attending(change: Callable[[Callable, mx.array, KeyValues], mx.array]) -> Any:
    """`change(attention, queries, keys and values)` in attention's place."""

    def call(original: Callable, module: Any, q: mx.array, kv: KeyValues, causal: bool) -> mx.array:
        return change(lambda q, kv: original(module, q, kv, causal), q, kv)

    return lambda: wrapped(ScaledDotProductAttention, "__call__", call)


def constant_sum() -> AbstractContextManager[object]:
    def call(original: Callable, module: Any, q: mx.array, kv: KeyValues, causal: bool) -> mx.array:
        groups = q.shape[1] // kv.keys.shape[1]
        keys, values = (mx.repeat(each, groups, axis=1).transpose(1, 0, 2) for each in kv)
        scores = q.transpose(1, 0, 2) @ keys.transpose(0, 2, 1) * q.shape[-1] ** -0.5
        n, m = scores.shape[1:]
        seen = mx.array(np.tri(n, m, m - n, dtype=bool)) if causal else mx.ones((n, m), mx.bool_)
        exps = mx.where(seen, mx.exp(scores - stop(scores.max(-1, keepdims=True))), 0)
        out = (exps / stop(exps.sum(-1, keepdims=True)) @ values).transpose(1, 0, 2)
        return regraded(original(module, q, kv, causal), out)

    return wrapped(ScaledDotProductAttention, "__call__", call)


def first_of_heads(attend: Callable, q: mx.array, kv: KeyValues) -> mx.array:
    groups = q.shape[1] // kv.keys.shape[1]
    spread = (mx.stack([each, *[stop(each)] * (groups - 1)], 2).reshape(len(each), -1, each.shape[-1]) for each in kv)
    return attend(q, KeyValues(*spread))


def gated(gate: Callable[[mx.array], mx.array]) -> Any:
    def call(original: Callable, module: MLP, x: mx.array) -> mx.array:
        g, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(regraded(silu(g) * up, gate(g) * up))

    return lambda: wrapped(MLP, "__call__", call)


def linear(change: Callable[[Linear, mx.array, mx.array], mx.array], where: str = "") -> Any:
    """`change(module, x, y)` in the place of what linears give, those whose number of outputs `where` names."""

    def call(original: Callable, module: Linear, x: mx.array) -> mx.array:
        return change(module, x, original(module, x)) if where in module or not where else original(module, x)

    return lambda: wrapped(Linear, "__call__", call)


def mean_bias(module: Linear, x: mx.array, y: mx.array) -> mx.array:
    return y if "bias" not in module else y - stop(module.bias) * 0 + times(module.bias, 1 / len(x)) - module.bias


def head(change: Callable[[mx.array], mx.array]) -> Any:
    """What goes through the widest linear, which is the head."""
    return linear(lambda m, x, y: regraded(y, x @ change(m.weight).T) if len(m.weight) > 300 else y)


def embedded(change: Callable[[mx.array, mx.array], mx.array]) -> Any:
    return lambda: wrapped(nn.Embedding, "__call__", lambda original, module, ids: change(original(module, ids), ids))


def layer(change: Callable[[ExpertRows, ExpertRows], ExpertRows]) -> Any:
    """`change(stream, attention's branch)` in their sum's place."""

    def call(original: Callable, layer: MoTDecoderLayer, x: ExpertRows, contexts: Any, causal: bool, wide: bool) -> Any:
        attended, seen = layer.self_attn(mot._by_expert(layer, "input_layernorm", x), contexts, causal, wide)
        return mot._each(layer._fed, change(x, attended), layer._intermediate_size), seen

    return lambda: wrapped(MoTDecoderLayer, "__call__", call)


def each(change: Callable[[mx.array], mx.array], rows: ExpertRows) -> ExpertRows:
    return ExpertRows(*(None if each is None else change(each) for each in rows))


def fed_twice() -> AbstractContextManager[object]:
    return wrapped(MoTDecoderLayer, "_fed", lambda original, layer, suffix, x: x + times(
        original(layer, suffix, x) - x, 2.0))  # fmt: skip


def past(change: Callable[[mx.array], mx.array]) -> Any:
    def call(original: Callable, given: LayerInput, keys: mx.array, values: mx.array) -> KeyValues:
        past = given.past and KeyValues(*(change(each) for each in given.past))
        return original(LayerInput(given.rotary, past), keys, values)

    return lambda: wrapped(LayerInput, "followed_by", call)


def checkpoint(change: Callable[[Callable], Callable]) -> Any:
    class Instead:
        """What is looked up of mlx.core by the checkpointed layer."""

        checkpoint = staticmethod(change)

        def __getattr__(self, name: str) -> Any:
            return getattr(mx, name)

    return lambda: replaced(checkpointing, "mx", Instead())


def total(**changed: Callable[[Any], Any]) -> Any:
    def of(original: Callable, samples: Any, settings: Any) -> Any:
        totals = original(samples, settings)
        return totals._replace(**{name: change(getattr(totals, name)) for name, change in changed.items()})

    return lambda: wrapped(loss.Totals, "of", of)


def losses(change: Callable[[Any, Any], mx.array]) -> Any:
    """`change(losses, settings)` is the loss."""
    return lambda: everywhere(loss, "losses_of", lambda original, found, sample, totals, settings: (
        losses := original(found, sample, totals, settings))._replace(loss=change(losses, settings)))  # fmt: skip


def summed(change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Any:
    """`change(gradients)` in the place of those of a pack."""
    return lambda: everywhere(step, "gradients", lambda original, *given, **values: (
        (both := original(*given, **values))[0], change(both[1])))  # fmt: skip


def last_sample() -> AbstractContextManager[object]:
    """Each sample's gradient takes the place of the one before."""

    def last(original: Callable, model: Any, samples: Any, *given: Any) -> Any:
        whole = step.losses_of

        def own(found: Any, sample: Any, *more: Any) -> Any:
            losses = whole(found, sample, *more)
            return losses if sample is samples[-1] else loss.Losses(*(0 * each for each in losses))

        with replaced(step, "losses_of", own):
            return original(model, samples, *given)

    return everywhere(step, "gradients", last)


def term(**changed: Callable[[mx.array], mx.array]) -> Any:
    return lambda: everywhere(loss, "terms", lambda original, *given: (found := original(*given))._replace(
        **{name: change(getattr(found, name)) for name, change in changed.items()}))  # fmt: skip


def flow(change: Callable[[Any], Any]) -> Any:
    """`change(state)` in the place of a sample's state."""
    return lambda: everywhere(pack, "flow_state", lambda original, *given: change(original(*given)))


def target(noise: float, clean: float) -> Any:
    """A target of so much of the noise and of the latents."""

    def state(original: Callable, sample: Any, drawn: Any, shift: float, dtype: mx.Dtype) -> Any:
        found = original(sample, drawn, shift, dtype)
        own = mx.concatenate([latent.reshape(-1, latent.shape[-1]) for latent in sample.latents]).astype(dtype)
        return found._replace(velocity=noise * drawn.noise.astype(dtype) + clean * own)

    return lambda: everywhere(pack, "flow_state", state)


def shift(change: Callable[[float], float]) -> Any:
    return lambda: everywhere(pack, "flow_state", lambda original, sample, drawn, shift, dtype: original(
        sample, drawn, change(shift), dtype))  # fmt: skip


def sample(name: str, change: Callable[[Any, Any], Any]) -> Any:
    """`change(sample, value)` in the place of a property of samples."""
    held = vars(pack.Sample)[name].fget
    return lambda: replaced(pack.Sample, name, property(lambda sample: change(sample, held(sample))))


def learns(change: Callable[[bool, str], bool]) -> Any:
    return lambda: wrapped(parts.Trained, "learns", lambda original, trained, path: change(
        original(trained, path), path))  # fmt: skip


def adamw(change: Callable[..., mx.array]) -> Any:
    """`change(adamw, gradient, parameter, state)` in the place of one parameter's step."""
    return lambda: wrapped(optim.AdamW, "apply_single", lambda original, adamw, gradient, parameter, state: change(
        partial(original, adamw), adamw, gradient, parameter, state))  # fmt: skip


def adam(original: Callable, adamw: Any, g: mx.array, w: mx.array, state: Any, inside: bool = False,
          corrected: bool = True) -> mx.array:  # fmt: skip
    (b1, b2), rate, t = adamw.betas, adamw.learning_rate.astype(g.dtype), adamw.step.astype(mx.float32)
    state["m"], state["v"] = b1 * state["m"] + (1 - b1) * g, b2 * state["v"] + (1 - b2) * g.square()
    m, v = (state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)) if corrected else (state["m"], state["v"])
    root = mx.sqrt(v + adamw.eps) if inside else mx.sqrt(v) + adamw.eps
    return w * (1 - rate * adamw.weight_decay) - rate * m / root


def clipping(change: Callable[[dict[str, mx.array], float], dict[str, mx.array]]) -> Any:
    """`change(gradients, bound)` in the place of clipped gradients."""
    return lambda: wrapped(optim, "clip_grad_norm", lambda original, gradients, bound: (
        change(gradients, bound), original(gradients, bound)[1]))  # fmt: skip


def settings(change: Callable[[Any], dict[str, Any]]) -> Any:
    """`change(settings)` says which of the optimizer's are others."""

    def made(original: Callable, optimizer: Any, settings: Any, parameters: Any) -> None:
        original(optimizer, replace(settings, **change(settings)), parameters)

    return lambda: wrapped(step.Optimizer, "__init__", made)


def averaged(change: Callable[[float, mx.array, mx.array, mx.array], mx.array]) -> Any:
    """`change(keep, average, parameter before, parameter after)` is the average."""

    def stepped(original: Callable, optimizer: Any, model: Any, gradients: Any) -> mx.array:
        average, before = dict(optimizer.average), dict(optimizer.masters)
        norm, keep = original(optimizer, model, gradients), optimizer._settings.ema
        after = optimizer.masters
        optimizer.average = {n: change(keep, each, before[n], after[n]) for n, each in average.items()}
        return norm

    return lambda: wrapped(step.Optimizer, "step", stepped)


def rate(change: Callable[[mx.array], mx.array]) -> Any:
    return lambda: wrapped(step.OptimizerSettings, "rate", lambda original, settings, at: original(
        settings, change(at)))  # fmt: skip


def detached(tree: Any) -> Any:
    """A tree of parameters that learn nothing."""
    return tree_map(stop, tree)


def bounded(found: dict[str, mx.array]) -> dict[str, mx.array]:
    """Gradients scaled to half of their norm."""
    total = mx.sqrt(sum(each.square().sum() for each in found.values()))
    return optim.clip_grad_norm(found, 0.3 * total.item())[0]


def smoothed() -> AbstractContextManager[object]:
    """Cross entropy of labels that are smoothed by 0.1."""
    return wrapped(nn.losses, "cross_entropy", lambda original, logits, targets: original(
        logits, targets, label_smoothing=0.1))  # fmt: skip


def early_answer() -> AbstractContextManager[object]:
    """An answer that begins one token early."""
    return everywhere(pack, "answering_sample", lambda original, *given, **values: replace(
        made := original(*given, **values), answer=made.answer - 1))  # fmt: skip


def all_noised() -> AbstractContextManager[object]:
    """Times and states as if nothing were given."""

    def state(original: Callable, sample: Any, drawn: Any, shift: float, dtype: mx.Dtype) -> Any:
        found = original(sample, drawn, shift, dtype)
        t = mx.broadcast_to(found.timesteps.max(), found.timesteps.shape)
        return found._replace(timesteps=t, x_t=drawn.noise.astype(dtype) - (1 - t)[:, None] * found.velocity)

    return everywhere(pack, "flow_state", state)


def dropped_caption() -> AbstractContextManager[object]:
    """Samples to draw without their text."""

    def made(original: Callable, *given: Any) -> Any:
        return original(*given[:6], pack.CAPTION, *given[7:])

    return everywhere(pack, "drawing_sample", made)


def decayed_gradient() -> AbstractContextManager[object]:
    """Adam with the decay in its gradient."""

    def stepped(original: Callable, adamw: Any, g: mx.array, w: mx.array, state: Any) -> mx.array:
        rate = adamw.learning_rate
        return original(g + adamw.weight_decay * w, w, state) + rate * adamw.weight_decay * w

    return adamw(stepped)()
