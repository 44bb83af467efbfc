"""Training with every part given what it should have been given, forwards and backwards, on both sides.

A tap stands at what a module makes, and one more, which ends in ".in", at what it is given. Each lets the given value
go on in the place of what was computed, and on the way back the given gradient in the place of the one that arrives:
what arrives at ".in" is then what that module alone makes of the gradient by its output, and what arrives at an output
is what those that read it pass on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_unflatten

import reference.training
from lance_mlx.model.mot import ExpertRows, MoTModel
from lance_mlx.training import step as mlx_step
from lance_mlx.training.checkpointing import checkpoint_layers
from parity.lance.training.bundle import GRADIENT
from parity.lance.training.mlx_side import MlxTraining
from parity.lance.training.names import IN
from parity.lance.training.torch_side import TorchTraining
from parity.ports.attach import Attached
from parity.tensors.recording import Recording, Tap

LAYERS = "language_model.model.layers."
_LEAVES = ("input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm",
           "q_rope", "k_rope", "gate_proj", "up_proj", "down_proj")  # fmt: skip
_ENDS = {
    "vae2llm",
    "language_model.model.norm",
    "language_model.model.norm_moe_gen",
    "llm2vae",
    "language_model.lm_head",
}
_OUTPUTS = {"language_model.model.embed_tokens"}


class OtherRows(Exception):
    """A part that is not called with as many rows as it should be; its only argument is the tap."""


@dataclass
class Passed:
    """What one steered run made: values and arriving gradients behind "grad/" by tap, and gradients by parameter."""

    values: Recording = field(default_factory=dict)
    parameters: Recording = field(default_factory=dict)

    @property
    def all(self) -> Recording:
        """Everything by name."""
        return self.values | self.parameters


def reads(path: str) -> bool:
    """Whether what a module is given has a tap of its own: it reads one array."""
    own = path.rpartition(".")[2].removesuffix("_moe_gen")
    return path in _ENDS or path.startswith(LAYERS) and own in _LEAVES


def tapped(path: str, coarse: bool) -> bool:
    """Whether what a module makes has a tap; with `coarse` none within a layer has."""
    inner = path.removeprefix(LAYERS)
    layer = path.startswith(LAYERS) and inner.isdigit()
    return layer or path in _OUTPUTS or path in _ENDS or not coarse and (reads(path) or path.endswith(".sdpa"))


class _Steer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, given: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        ctx.gradient = gradient
        return given.clone()

    @staticmethod
    def backward(ctx: Any, arriving: torch.Tensor) -> tuple:
        return arriving if ctx.gradient is None else ctx.gradient, None, None


def torch_run(side: TorchTraining, given: Recording, coarse: bool = False) -> Passed:
    """The reference's run; without anything given it goes its own way."""
    parts: dict[str, list[torch.Tensor]] = {}
    made: dict[str, list[torch.Tensor]] = {}
    offsets: dict[str, int] = {}

    def tap(name: str, x: torch.Tensor) -> torch.Tensor:
        start = offsets.get(name, 0)
        offsets[name] = start + len(x)
        made.setdefault(name, []).append(x.detach())

        def own(of: str) -> torch.Tensor | None:
            held = given.get(of)
            return None if held is None else torch.from_numpy(held.array[start : start + len(x)]).to(x.dtype)

        value = own(name)
        y = x.clone() if value is None else _Steer.apply(x, value.reshape(x.shape), own(GRADIENT + name))
        parts.setdefault(name, []).append(y)
        # Rows of embeddings are filled in place.
        return y.clone()

    with Attached() as attached:
        hooks = []
        for path, module in side.model.named_modules():
            if tapped(path, coarse):
                if reads(path) and not (coarse and path.startswith(LAYERS)):
                    hooks.append(module.register_forward_pre_hook(
                        lambda module, args, path=path: (tap(path + IN, args[0]), *args[1:])))  # fmt: skip
                hooks.append(module.register_forward_hook(lambda module, args, out, path=path: tap(path, out)))
        hooks.append(side.model.language_model.register_forward_pre_hook(
            lambda module, args, values: (args, values | {"inputs_embeds": tap("hidden_in", values["inputs_embeds"])}),
            with_kwargs=True))  # fmt: skip
        attached.returned(reference.training, "squared_errors", lambda errors: tap("mse", errors))
        attached.returned(reference.training, "cross_entropies", lambda both: (tap("ce", both[0]), both[1]))
        found = side.forward()
        for hook in hooks:
            hook.remove()
    names = [name for name, each in parts.items() if all(part.requires_grad for part in each)]
    learned = {name: each for name, each in side.model.named_parameters() if each.requires_grad}
    wanted = [part for name in names for part in parts[name]] + list(learned.values())
    # What passes no gradient on hides nothing behind it: each tap is asked for its own.
    loss = found.loss + sum(0.0 * part.float().sum() for name in names for part in parts[name])
    gradients = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    held = [torch.zeros_like(one) if (got := next(gradients)) is None else got for one in wanted]
    passed, left = Passed({n: _tap(torch.cat(each)) for n, each in made.items()}), iter(held)
    for name in names:
        passed.values[GRADIENT + name] = _tap(torch.cat([next(left) for _ in parts[name]]))
    passed.parameters = {name: _tap(next(left)) for name in learned}
    passed.values["loss"] = _tap(found.loss.detach())
    return passed


@mx.custom_function
def _steer(x: mx.array, given: mx.array, gradient: mx.array) -> mx.array:
    return given


@_steer.vjp
def _steer_back(primals: tuple, arriving: mx.array, output: mx.array) -> tuple:
    return primals[2], mx.zeros_like(primals[1]), mx.zeros_like(primals[2])


class MlxSteered:
    """lance_mlx with what each of its parts should be given, which is the reference's."""

    def __init__(self, side: MlxTraining, given: Recording, coarse: bool = False) -> None:
        self.side, self.coarse, self._only = side, coarse, None
        self._given = {name: mx.array(tap.array) for name, tap in given.items()}
        self._offsets: dict[str, int] = {}
        self._made: dict[str, list[mx.array]] = {}

    def run(self) -> Passed:
        """Values, arriving gradients, and gradients by parameter as they add up on the way back."""
        model = self.side.model
        probes = {name: mx.zeros_like(each) for name, each in self._given.items()
                  if not name.startswith(GRADIENT)}  # fmt: skip
        kept = model.trainable_parameters()

        def loss(parameters: dict[str, mx.array], probes: dict[str, mx.array]) -> mx.array:
            model.update(tree_unflatten(list(parameters.items())))
            return self._loss(probes)

        with self._attached({}):
            values = {"loss": self._loss({})} | {n: mx.concatenate(each) for n, each in self._made.items()}
            mx.eval(values)
        with self._attached(probes):
            parameters, arriving = mx.grad(loss, argnums=(0, 1))(dict(tree_flatten(kept)), probes)
            mx.eval(parameters, arriving)
        model.update(kept)
        arriving = {GRADIENT + n: each for n, each in arriving.items() if GRADIENT + n in self._given}
        return Passed(_taps(values | arriving), _taps(parameters))

    def of_sample(self, index: int) -> Recording:
        """Gradients by parameter of one sample of the pack alone."""
        self._only = index
        try:
            return self.run().parameters
        finally:
            self._only = None

    def gradients(self) -> Recording:
        """Gradients by parameter as lance_mlx adds them up over a pack."""
        with self._attached({}):
            return _taps(self.side.gradients()[1])

    def _loss(self, probes: Mapping[str, mx.array]) -> mx.array:
        side, self._probes = self.side, probes
        self._offsets, self._made, self._steered = {}, {}, []
        totals, loss = mlx_step.Totals.of(side.samples, side.settings), mx.array(0.0)
        for sample, drawn in zip(side.samples, side.draws, strict=True):
            found = mlx_step.terms(side.model, sample, drawn, side.settings.timestep_shift, side.vocabulary)
            own = mlx_step.losses_of(found, sample, totals, side.settings).loss
            loss = loss + (own if self._only in (None, side.samples.index(sample)) else 0 * own)
        # What passes no gradient on hides nothing behind it: each tap is asked for its own.
        return loss + sum(0.0 * each.astype(mx.float32).sum() for each in self._steered)

    def _tap(self, name: str, x: mx.array) -> mx.array:
        given = self._given.get(name)
        if given is None or not x.size:
            return x
        start = self._offsets.get(name, 0)
        self._offsets[name] = start + len(x)
        own = given[start : start + len(x)]
        if own.size != x.size:
            raise OtherRows(name)
        self._made.setdefault(name, []).append(x)
        back = self._given.get(GRADIENT + name, mx.zeros_like(given))[start : start + len(x)]
        y = _steer(x, own.reshape(x.shape).astype(x.dtype), back.reshape(x.shape).astype(x.dtype))
        self._steered.append(y)
        if name not in self._probes:
            return y
        return y + self._probes[name][start : start + len(x)].reshape(x.shape).astype(x.dtype)

    @contextmanager
    def _attached(self, probes: Mapping[str, mx.array]) -> Iterator[None]:
        model = self.side.model
        layers = model.language_model.model.layers
        self._offsets, self._made, self._steered, self._probes = {}, {}, [], probes
        kinds = [type(layer) for layer in layers]
        if self.coarse:
            checkpoint_layers(model)
        modules = {id(m): (path, m) for path, m in model.named_modules() if tapped(path, self.coarse)}
        running: list[int] = []

        def called(original: Callable, module: mlx.nn.Module, x: Any, *args: Any, **values: Any) -> Any:
            # Also one whose class calls that which it is derived from is seen once.
            if id(module) not in modules or running[-1:] == [id(module)]:
                return original(module, x, *args, **values)
            path = modules[id(module)][0]
            running.append(id(module))
            if reads(path) and not (self.coarse and path.startswith(LAYERS)):
                x = self._tap(path + IN, x)
            output = original(module, x, *args, **values)
            running.pop()
            if isinstance(output, tuple):
                return self._by_expert(path, output[0]), output[1]
            return self._tap(path, output)

        try:
            with Attached() as attached:
                for kind in {type(module): None for _, module in modules.values()}:
                    attached.wrap(kind, "__call__", called)
                attached.wrap(MoTModel, "__call__", lambda original, module, rows, *args, **values: original(
                    module, self._by_expert("hidden_in", rows), *args, **values))  # fmt: skip
                attached.returned(mlx_step, "terms", lambda found: found._replace(
                    mse=self._tap("mse", found.mse), ce=self._tap("ce", found.ce)))  # fmt: skip
                yield
        finally:
            for layer, kind in zip(layers, kinds, strict=True):
                layer.__class__ = kind

    def _by_expert(self, name: str, rows: ExpertRows) -> ExpertRows:
        return rows.by_expert(self._tap(name, rows.interleave()))


def rows_of(side: TorchTraining, mlx: MlxTraining, recording: Recording) -> Recording:
    """What the reference's run made, of the rows that mlx runs: those behind the last loss it leaves out."""
    gen, text, start = [], [], 0
    for layout in (sample.layout for sample in side.samples):
        ids = np.arange(len(layout.text_ids))
        latent = np.isin(ids, layout.latent_rows) if layout.answer is None else np.zeros(len(ids), bool)
        gen.append(latent)
        text.append(~latent & ~np.isin(ids, layout.vit_rows))
        start += len(ids)
    is_gen, is_text, run = np.concatenate(gen), np.concatenate(text), mlx.run_rows()

    def chosen(name: str, array: np.ndarray) -> np.ndarray:
        path = name.removeprefix(GRADIENT).removesuffix(IN)
        if path.endswith("embed_tokens"):
            return array[is_text & run]
        expert = not path.endswith(("_rope", ".sdpa")) and not path.removeprefix(LAYERS).isdigit()
        if not path.startswith("language_model.model.") and path != "hidden_in":
            return array
        if path == "hidden_in" or not expert:
            return array[run]
        own = is_gen if "_moe_gen" in path else ~is_gen
        return array[run[own]]

    return {name: Tap(chosen(name, tap.array), tap.dtype) if tap.array.ndim else tap
            for name, tap in recording.items()}  # fmt: skip


def _tap(tensor: torch.Tensor) -> Tap:
    return Tap(tensor.detach().float().numpy(), "float32")


def _taps(arrays: Mapping[str, mx.array]) -> Recording:
    return {name: Tap(np.array(each.astype(mx.float32)), "float32") for name, each in arrays.items()}
