"""Recording and steering lance_mlx: classes and functions wrapped from outside for the duration."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.calls import CALLS
from lance_mlx.model.lance import Lance, LatentPositionEmbedding, TimestepEmbedder
from lance_mlx.model.layers import FusedLinear
from lance_mlx.model.mot import ArmInput, ExpertRows, KVCache, MoTModel
from lance_mlx.model.rope import rotary_table
from lance_mlx.model.vae import VAE, LatentStatistics
from lance_mlx.model.vit import VisionTransformer
from lance_mlx.pipeline import Pipeline
from lance_mlx.sampling import flow
from lance_mlx.sampling.conditions import GuidanceArm
from lance_mlx.sampling.text import AnswerDecoder
from parity.errors import ParityError
from parity.lance.arrays_mlx import Rows, apart, channels_first, channels_last, from_tap, held, joined, to_tap
from parity.ports.attach import Attached, owner_of
from parity.tensors.recording import Recording, Tap

_VIT = "vit_model"
_EMBED_TOKENS = "language_model.model.embed_tokens"
_WATCHED = ("language_model.", f"{_VIT}.", "llm2vae", "vae2llm")
_UNNAMED = ("language_model", "language_model.model")
_BY_READING = tuple(owner_of(CALLS[call])[0] for call in ("rotation", "attention"))
"""Modules that a pass of several readings calls once for each; all others are given the rows of all."""


class MlxCapture:
    """Context manager that records what a loaded pipeline computes, under the oracles' tap names.

    Args:
        names: limits what is kept; None keeps everything.
        force: taps whose values replace what is computed, after that was recorded: all that follows sees them.

    The classes of the modules and of the arms, and what makes a pass of a step, are wrapped until the context ends; the
    model files know nothing of it. What a call computes is evaluated when the next one begins.
    """

    def __init__(
        self, pipeline: Pipeline, names: Container[str] | None = None, force: Mapping[str, Tap] | None = None
    ) -> None:
        self.force = force or {}
        self._taken: Recording = {}
        self._pending: dict[str, Rows] = {}
        self._names = names
        self._calls = ("",)
        self._turns: Counter[int] = Counter()
        self._embedding: list[str] = []
        self._counts = {"encode": -1, "encode_chunk": 0, "decode_chunk": 0, _VIT: -1}
        self._pipeline = pipeline
        self._paths = {
            id(module): path
            for path, module in pipeline.model.named_modules()
            if path.startswith(_WATCHED) and path not in _UNNAMED
        }
        for coder in ("encoder", "decoder", "conv1", "conv2"):
            if coder in pipeline.vae:
                named = pipeline.vae[coder].named_modules()
                below = coder if coder.startswith("conv") else ""
                self._paths |= {id(module): below or f"{coder}.{path}" for path, module in named if path or below}
        self._codes = {key for key, path in self._paths.items() if path.startswith(("encoder.", "decoder.", "conv"))}
        modules = [*pipeline.model.modules(), *pipeline.vae.modules()]
        self._classes = {type(module) for module in modules if id(module) in self._paths}
        self._attached = Attached()

    @property
    def recording(self) -> Recording:
        """What has been recorded so far."""
        self._flush()
        return self._taken

    @property
    def call(self) -> str:
        """The name of the call that what follows belongs to; the first one's of a pass of several readings."""
        return self._calls[0]

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of all readings of the pass that what follows belongs to."""
        return self._calls

    def keep(self, name: str, value: Rows) -> None:
        """Record an array under a name, if the name is wanted and not yet taken."""
        if (self._names is None or name in self._names) and name not in self._taken and name not in self._pending:
            self._pending[name] = held(value)

    def observe(self, name: str, value: mx.array) -> mx.array:
        """Record an array and return what is to be used in its place: the forced value, or the array itself."""
        self.keep(name, value)
        return self._forced(name) if name in self.force else value

    def _observe_rows(self, name: str, rows: mx.array | ExpertRows) -> mx.array | ExpertRows:
        """The same for rows that may be parted by expert."""
        if isinstance(rows, mx.array):
            return self.observe(name, rows)
        # Parted rows are recorded as they are: to merge them takes MLX longer than NumPy.
        self.keep(name, rows if rows.gen is not None else rows.und)
        return rows.by_expert(self._forced(name)) if name in self.force else rows

    def _observe_readings(self, path: str, rows: mx.array | ExpertRows) -> mx.array | ExpertRows:
        """The same for the rows of all readings of a pass, each under the name of its call."""
        names = [f"{call}/{path}" for call in self._calls]
        if len(names) == 1:
            return self._observe_rows(names[0], rows)
        parts = [self._observe_rows(name, part) for name, part in zip(names, apart(rows, len(names)), strict=True)]
        return joined(parts) if any(name in self.force for name in names) else rows

    def _forced(self, name: str) -> mx.array:
        return from_tap(self.force[name])

    def __enter__(self) -> "MlxCapture":
        for kind in self._classes:
            self._attached.wrap(kind, "__call__", self._called)
        self._around("fused products", after=self._joined)
        # A module that is given its rows in pieces is recorded as one call.
        for rows in ("rows of products", "rows of layers"):
            self.wrap(rows, lambda original, function, width, *arrays: function(*arrays))
        self.wrap("transformer", self._model)
        self.wrap("time embedding", self._embed_time)
        self._around("latent positions", after=self._embed_places)
        self._around("encode", before=self._enter_encode, after=self._encoded)
        self._around("sampled latent", after=self._sampled)
        self._around("encoded chunk", before=self._enter_encoder, after=self._coded("encoder"))
        self._around("decoded chunk", after=self._coded("decoder"))
        self._around("ViT", before=self._enter_vit, after=self._seen)
        self._around("prefill", before=self._enter_prefill, after=self._after_prefill)
        self._around("step", before=self._enter_step)
        self._around("token", before=self._enter_token)
        return self

    def __exit__(self, *exception: object) -> None:
        self._attached.__exit__(*exception)

    def wrap(self, call: str, wrapper: Callable[..., Any]) -> None:
        """Replace what lance_mlx names so in CALLS by `wrapper(original, *arguments)` until the context ends."""
        self._attached.wrap(*owner_of(CALLS[call]), wrapper)

    def enter(self, *calls: str) -> None:
        """Name what follows after a call, such as "cond.step0", or after those of the readings of one pass; what was
        computed before is evaluated."""
        if calls != self._calls:
            self._flush()
            if any(count % len(self._calls) for count in self._turns.values()):
                raise ParityError(f"a module ran another number of times than {' and '.join(self._calls)} need it")
            self._calls = calls
            self._turns.clear()

    def _around(self, call: str, before: Callable | None = None, after: Callable | None = None) -> None:
        def wrapper(original: Callable, first: Any, *args: Any, **values: Any) -> Any:
            if before is not None:
                before(first, *args)
            output = original(first, *args, **values)
            return output if after is None else after(first, output)

        self.wrap(call, wrapper)

    def _flush(self) -> None:
        mx.eval([value for value in self._pending.values() if not isinstance(value, np.ndarray)])
        self._taken |= {name: to_tap(value) for name, value in self._pending.items()}
        self._pending.clear()

    def _called(self, original: Callable, module: nn.Module, *args: Any, **values: Any) -> Any:
        return self._module(module, original(module, *args, **values))

    def _module(self, module: nn.Module, output: Any) -> Any:
        path = self._paths.get(id(module))
        if path is None:
            return output
        if path == _EMBED_TOKENS and self._embedding:
            self.enter(self._embedding.pop(0))
        if path == "conv2":
            self.enter(f"vae.decode.chunk{self._counts['decode_chunk']}")
            self._counts["decode_chunk"] += 1
        rows = output[0] if isinstance(output, tuple) and not isinstance(output, ExpertRows) else output
        if path.startswith(_VIT):
            rows = self.observe(f"{self.call}.{path.removeprefix(f'{_VIT}.')}", rows)
        elif id(module) in self._codes:
            rows = channels_last(self.observe(f"{self.call}/{path}", channels_first(rows)))
        elif isinstance(module, _BY_READING):
            call = self._calls[self._turns[id(module)] % len(self._calls)]
            self._turns[id(module)] += 1
            rows = self.observe(f"{call}/{path}", rows)
        else:
            rows = self._observe_readings(path, rows)
        return (rows, *output[1:]) if isinstance(output, tuple) and not isinstance(output, ExpertRows) else rows

    def _joined(self, joined: FusedLinear, outputs: list[mx.array]) -> list[mx.array]:
        return [self._module(linear, output) for linear, output in zip(joined.linears, outputs, strict=True)]

    def _model(
        self,
        original: Callable,
        model: MoTModel,
        inputs_embeds: ExpertRows,
        readings: Sequence[ArmInput],
        *rest: Any,
        **values: Any,
    ) -> tuple[ExpertRows, list[KVCache]]:
        readings = [self._placed(*each) for each in zip(self._calls, readings, strict=True)]
        inputs_embeds = self._observe_readings("hidden_in", inputs_embeds)
        hidden, caches = original(model, inputs_embeds, readings, *rest, **values)
        return self._observe_readings("hidden_out", hidden), caches

    def _placed(self, call: str, reading: ArmInput) -> ArmInput:
        name, position_ids = f"{call}/position_ids", reading.rotary.position_ids
        self.keep(name, position_ids)
        given = self.force.get(name)
        if given is None or np.array_equal(given.array, position_ids):
            return reading
        model = self._pipeline.model
        return reading._replace(rotary=rotary_table(given.array, model.config, model.numerics))

    def _embed_time(self, original: Callable, module: TimestepEmbedder, timesteps: np.ndarray) -> mx.array:
        output = original(module, timesteps)
        if ".step0" in self.call:
            self.keep("time_embedder", output[-1])
        return self.observe(f"{self.call}/time_embedder", output)

    def _embed_places(self, module: LatentPositionEmbedding, output: mx.array) -> mx.array:
        return self.observe(f"{self.call}/latent_pos_embed", output)

    @contextmanager
    def embedding(self, calls: Sequence[str]) -> Iterator[None]:
        """Name what is embedded inside after these calls, in turn: each segment looks its tokens up once, first."""
        self._embedding = list(calls)
        yield
        self._embedding = []

    def _enter_prefill(self, arm: GuidanceArm, index: int) -> None:
        self.enter(f"{arm.name}.{'prefill' if isinstance(arm, AnswerDecoder) else 'prefix'}{index}")

    def _after_prefill(self, arm: GuidanceArm, output: None) -> None:
        # What is embedded between the prefixes and the first velocity belongs to the first step.
        if not isinstance(arm, AnswerDecoder):
            self.enter("cond.step0")

    def _enter_step(self, model: Lance, arms: Sequence[flow.Arm], state: flow.State) -> None:
        self.enter(*(f"{arm.name}.step{state.index}" for arm in arms))

    def _enter_token(self, reader: AnswerDecoder, step: int, token: mx.array) -> None:
        self.enter(f"{reader.name}.decode{step}")

    def _enter_encode(self, vae: VAE, pixels: np.ndarray) -> None:
        self._counts["encode"] += 1
        self._counts["encode_chunk"] = 0

    def _encoded(self, vae: VAE, statistics: LatentStatistics) -> LatentStatistics:
        call = f"vae.encode{self._counts['encode']}"
        return LatentStatistics(
            *(
                channels_last(self.observe(f"{call}.{name}", channels_first(value)))
                for name, value in zip(("mean", "logvar"), statistics, strict=True)
            )
        )

    def _sampled(self, statistics: LatentStatistics, output: mx.array) -> mx.array:
        return self.observe(f"vae.latent{self._counts['encode']}", output)

    def _enter_encoder(self, *arguments: Any) -> None:
        self.enter(f"vae.encode{self._counts['encode']}.chunk{self._counts['encode_chunk']}")
        self._counts["encode_chunk"] += 1

    def _coded(self, coder: str) -> Callable[[nn.Module, mx.array], mx.array]:
        def coded(module: nn.Module, output: mx.array) -> mx.array:
            return channels_last(self.observe(f"{self.call}/{coder}", channels_first(output)))

        return coded

    def _enter_vit(self, *arguments: Any) -> None:
        self._counts[_VIT] += 1
        self.enter(f"{_VIT}{self._counts[_VIT]}")

    def _seen(self, module: VisionTransformer, output: mx.array) -> mx.array:
        return self.observe(f"{_VIT}{self._counts[_VIT]}", output)
