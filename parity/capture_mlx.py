"""Recording lance_mlx: module classes wrapped from outside for the duration, and the replay of a request."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.model.lance import TimestepEmbedder
from lance_mlx.model.mot import ExpertRows, MoTModel
from lance_mlx.model.vae import VAE, LatentStatistics
from lance_mlx.model.vae_decoder import Decoder
from lance_mlx.model.vae_encoder import Encoder
from lance_mlx.model.vit import VisionTransformer
from lance_mlx.pipeline import Pipeline
from lance_mlx.sampling.conditions import CachedArm
from lance_mlx.sampling.flow import Arm, State
from lance_mlx.sampling.text import Reader
from parity.recording import Recording, Tap

_LAYERS = "language_model.model.layers."
_VIT = "vit_model"


def to_tap(value: mx.array | np.ndarray) -> Tap:
    """Hold an array as a tap: bfloat16 values as float32, integers as int32."""
    if isinstance(value, np.ndarray):
        value = mx.array(value)
    if not mx.issubdtype(value.dtype, mx.floating):
        return Tap(np.array(value.astype(mx.int32)), "int32")
    name = "bfloat16" if value.dtype == mx.bfloat16 else "float32"
    return Tap(np.array(value.astype(mx.float32)), name)


def channels_first(frames: mx.array) -> mx.array:
    """[t, h, w, c] as the oracles' [1, c, t, h, w]."""
    return frames.transpose(3, 0, 1, 2)[None]


class MlxCapture:
    """Context manager that records what a loaded pipeline computes, under the oracles' tap names.

    `names` limits what is kept (None keeps everything). The classes of the modules, and the arms', are wrapped until
    the context ends; the model files know nothing of it.
    """

    def __init__(self, pipeline: Pipeline, names: set[str] | None = None) -> None:
        self.recording: Recording = {}
        self._names = names
        self._call = ""
        self._counts = {"encode": -1, "encode_chunk": 0, "decode_chunk": 0, _VIT: -1}
        self._llm2vae = pipeline.model.llm2vae
        self._paths = {
            id(module): path
            for path, module in pipeline.model.named_modules()
            if path.startswith((_LAYERS, f"{_VIT}.")) or path == "llm2vae"
        }
        for coder in ("encoder", "decoder"):
            if coder in pipeline.vae:
                named = pipeline.vae[coder].named_modules()
                self._paths |= {id(module): f"{coder}.{path}" for path, module in named if path}
        modules = [*pipeline.model.modules(), *pipeline.vae.modules()]
        self._classes = {type(module) for module in modules if id(module) in self._paths}
        self._stack = ExitStack()

    def keep(self, name: str, value: mx.array | np.ndarray) -> None:
        """Record an array under a name, if the name is wanted and not yet taken."""
        if (self._names is None or name in self._names) and name not in self.recording:
            self.recording[name] = to_tap(value)

    def __enter__(self) -> "MlxCapture":
        for kind in self._classes:
            self._wrap(kind, "__call__", after=self._module)
        self._wrap(MoTModel, "__call__", before=self._model_inputs, after=self._model_output)
        self._wrap(TimestepEmbedder, "__call__", after=self._embedded_time)
        self._wrap(VAE, "encode", before=self._enter_encode, after=self._encoded)
        self._wrap(Encoder, "__call__", before=self._enter_encoder, after=self._coded("encoder"))
        self._wrap(Decoder, "__call__", before=self._enter_decoder, after=self._coded("decoder"))
        self._wrap(VisionTransformer, "__call__", before=self._enter_vit, after=self._seen)
        self._wrap(CachedArm, "prefill", before=self._enter_prefill)
        self._wrap(Arm, "velocity", before=self._enter_velocity)
        self._wrap(Reader, "decode", before=self._enter_token)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _wrap(self, kind: type, method: str, before: Callable | None = None, after: Callable | None = None) -> None:
        inherited = method not in vars(kind)
        original = getattr(kind, method)

        def wrapped(module: Any, *args: Any, **values: Any) -> Any:
            if before is not None:
                before(module, *args)
            output = original(module, *args, **values)
            if after is not None:
                after(module, output)
            return output

        setattr(kind, method, wrapped)
        if inherited:
            self._stack.callback(delattr, kind, method)
        else:
            self._stack.callback(setattr, kind, method, original)

    def _module(self, module: nn.Module, output: Any) -> None:
        path = self._paths.get(id(module))
        if path is None:
            return
        if isinstance(output, tuple) and not isinstance(output, ExpertRows):
            output = output[0]
        if isinstance(output, ExpertRows):
            output = output.merged()
        if path.startswith(("encoder.", "decoder.")):
            output = channels_first(output)
        separator = "." if path.startswith(_VIT) else "/"
        self.keep(f"{self._call}{separator}{path.removeprefix(f'{_VIT}.')}", output)

    def _model_inputs(self, model: MoTModel, inputs_embeds: ExpertRows, rotary: Any, *rest: Any) -> None:
        self.keep(f"{self._call}/position_ids", rotary.position_ids)
        self.keep(f"{self._call}/hidden_in", inputs_embeds.merged())

    def _model_output(self, model: MoTModel, output: tuple) -> None:
        self.keep(f"{self._call}/hidden_out", output[0].merged())

    def _embedded_time(self, module: TimestepEmbedder, output: mx.array) -> None:
        # Clean latents are embedded too, at t = 0, before any pass: the step's time comes after the prefixes.
        if ".prefix" in self._call:
            self.keep("time_embedder", output[-1])

    def _enter_prefill(self, arm: CachedArm, index: int) -> None:
        self._call = f"{arm.name}.{'prefill' if isinstance(arm, Reader) else 'prefix'}{index}"

    def _enter_velocity(self, arm: Arm, state: State) -> None:
        self._call = f"{arm.name}.step{state.index}"

    def _enter_token(self, reader: Reader, step: int, token: int) -> None:
        self._call = f"{reader.name}.decode{step}"

    def _enter_encode(self, vae: VAE, pixels: np.ndarray) -> None:
        self._counts["encode"] += 1
        self._counts["encode_chunk"] = 0

    def _encoded(self, vae: VAE, statistics: LatentStatistics) -> None:
        for name, value in zip(("mean", "logvar"), statistics, strict=True):
            self.keep(f"vae.encode{self._counts['encode']}.{name}", channels_first(value))

    def _enter_encoder(self, *arguments: Any) -> None:
        self._call = f"vae.encode{self._counts['encode']}.chunk{self._counts['encode_chunk']}"
        self._counts["encode_chunk"] += 1

    def _enter_decoder(self, *arguments: Any) -> None:
        self._call = f"vae.decode.chunk{self._counts['decode_chunk']}"
        self._counts["decode_chunk"] += 1

    def _coded(self, coder: str) -> Callable[[nn.Module, mx.array], None]:
        return lambda module, output: self.keep(f"{self._call}/{coder}", channels_first(output))

    def _enter_vit(self, *arguments: Any) -> None:
        self._counts[_VIT] += 1
        self._call = f"{_VIT}{self._counts[_VIT]}"

    def _seen(self, module: VisionTransformer, output: mx.array) -> None:
        self.keep(f"{_VIT}{self._counts[_VIT]}", output)
