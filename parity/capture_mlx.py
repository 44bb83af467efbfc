"""Recording lance_mlx: module classes wrapped from outside for the duration, and the replay of a request."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.model.lance import TimestepEmbedder
from lance_mlx.model.mot import ExpertRows, MoTModel
from lance_mlx.model.vae_decoder import Decoder
from lance_mlx.numerics import policy
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.positions import latent_position_ids, position_ids, unconditional_position_ids
from lance_mlx.prompt import build_sequence
from lance_mlx.request import Entry, Request
from lance_mlx.sampling.flow import Arm, State
from lance_mlx.sampling.schedule import timesteps
from lance_mlx.sequence import AttentionMode, Sequence
from lance_mlx.tokenizer import LanceTokenizer
from parity.recording import Recording, Tap

_REQUEST_KEYS = {
    "task": "task",
    "spec": "prompt",
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "num_steps": "num_steps",
    "timestep_shift": "timestep_shift",
    "text_template": "text_template",
    "cfg_text_scale": "guidance_scale",
    "cfg_interval": "guidance_interval",
    "cfg_renorm_min": "guidance_renorm_min",
}
"""Names of the bundles' requests, which are upstream's, and what lance_mlx calls them."""
_LAYERS = "language_model.model.layers."


def to_tap(value: mx.array | np.ndarray) -> Tap:
    """Hold an array as a tap: bfloat16 values as float32, integers as int32."""
    if isinstance(value, np.ndarray):
        value = mx.array(value)
    if not mx.issubdtype(value.dtype, mx.floating):
        return Tap(np.array(value.astype(mx.int32)), "int32")
    name = "bfloat16" if value.dtype == mx.bfloat16 else "float32"
    return Tap(np.array(value.astype(mx.float32)), name)


class MlxCapture:
    """Context manager that records what a loaded pipeline computes, under the oracles' tap names.

    `names` limits what is kept (None keeps everything). The classes of the modules, and Arm, are wrapped until the
    context ends; the model files know nothing of it.
    """

    def __init__(self, pipeline: Pipeline, names: set[str] | None = None) -> None:
        self.recording: Recording = {}
        self._names = names
        self._call = ""
        self._chunk = 0
        self._paths = {id(m): path for path, m in pipeline.model.named_modules() if path.startswith(_LAYERS)}
        self._paths |= {id(m): f"decoder.{path}" for path, m in pipeline.vae.decoder.named_modules() if path}
        modules = [*pipeline.model.modules(), *pipeline.vae.modules()]
        self._classes = {type(module) for module in modules if id(module) in self._paths}
        self._stack = ExitStack()
        self._llm2vae = pipeline.model.llm2vae

    def keep(self, name: str, value: mx.array | np.ndarray) -> None:
        """Record an array under a name, if the name is wanted and not yet taken."""
        if (self._names is None or name in self._names) and name not in self.recording:
            self.recording[name] = to_tap(value)

    def __enter__(self) -> "MlxCapture":
        for kind in self._classes | {type(self._llm2vae)}:
            self._wrap(kind, "__call__", after=self._module)
        self._wrap(MoTModel, "__call__", before=self._model_inputs, after=self._model_output)
        self._wrap(TimestepEmbedder, "__call__", after=lambda module, output: self.keep("time_embedder", output[-1]))
        self._wrap(Decoder, "__call__", before=self._enter_chunk, after=self._decoded)
        self._wrap(Arm, "prefill", before=self._enter_prefill)
        self._wrap(Arm, "velocity", before=self._enter_velocity)
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
        self._stack.callback(delattr, kind, method) if inherited else self._stack.callback(
            setattr, kind, method, original
        )

    def _module(self, module: nn.Module, output: Any) -> None:
        if module is self._llm2vae:
            self.keep(f"{self._call}/llm2vae", output)
            return
        path = self._paths.get(id(module))
        if path is None:
            return
        if isinstance(output, tuple) and not isinstance(output, ExpertRows):
            output = output[0]
        if isinstance(output, ExpertRows):
            output = output.merged()
        self.keep(f"{self._call}/{path}", _channels_first(output) if path.startswith("decoder.") else output)

    def _model_inputs(self, model: MoTModel, inputs_embeds: ExpertRows, rotary: Any, *rest: Any) -> None:
        self.keep(f"{self._call}/hidden_in", inputs_embeds.merged())
        self.keep(f"{self._call}/position_ids", rotary.position_ids)

    def _model_output(self, model: MoTModel, output: tuple) -> None:
        self.keep(f"{self._call}/hidden_out", output[0].merged())

    def _enter_prefill(self, arm: Arm, index: int) -> None:
        self._call = f"{arm.name}.prefix{index}"

    def _enter_velocity(self, arm: Arm, state: State) -> None:
        self._call = f"{arm.name}.step{state.index}"

    def _enter_chunk(self, *arguments: Any) -> None:
        self._call = f"vae.decode.chunk{self._chunk}"
        self._chunk += 1

    def _decoded(self, decoder: Decoder, output: mx.array) -> None:
        self.keep(f"{self._call}/decoder", _channels_first(output))


def _channels_first(frames: mx.array) -> mx.array:
    """[t, h, w, c] as the oracles' [1, c, t, h, w]."""
    return frames.transpose(3, 0, 1, 2)[None]


def request_from_bundle(request: dict, entry: str) -> Request:
    """The lance_mlx request that a bundle's request stands for; raises LanceError for one it cannot run."""
    values = {ours: request[theirs] for theirs, ours in _REQUEST_KEYS.items() if theirs in request}
    if "cfg_renorm_type" in request:
        kind = request["cfg_renorm_type"]
        values["guidance_renorm"] = "none" if kind is None or kind.lower() in ("", "none", "null") else kind
    if request["task"] == "t2i":
        values["num_frames"] = 1
    return Request.from_dict(values | {"entry": entry})


def record_mlx(
    checkpoint_dir: Path,
    variant: str,
    request: dict,
    entry: str,
    noise: np.ndarray,
    numerics: str,
    names: set[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Recording:
    """Replay a request on lance_mlx from given noise, float32 [latents, 48], and record it.

    `entry` is "kv_cache" or "full_sequence", `numerics` a policy's name. Beside the oracles' taps the recording holds
    the layout's integers under their names in inputs.safetensors and `sampler.velocity{k}`, the velocity after
    guidance. `progress` is told the name of each call before it runs. Raises LanceError for bad input.
    """
    asked = request_from_bundle(request, entry)
    pipeline = load(checkpoint_dir / variant, asked.task, policy(numerics))
    return record_pipeline(pipeline, asked, noise, names, progress)


def record_pipeline(
    pipeline: Pipeline,
    request: Request,
    noise: np.ndarray,
    names: set[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Recording:
    """Replay a request on a loaded pipeline; see record_mlx."""
    tell = progress or (lambda call: None)
    sequence = build_sequence(request, pipeline.tokenizer)
    start = mx.array(np.asarray(noise, np.float32)).astype(pipeline.model.numerics.dtype)
    with MlxCapture(pipeline, names) as capture:
        for name, array in _layout(request, sequence, pipeline.model.config.tokens_per_second).items():
            capture.keep(name, array)
        capture.keep("sampler.noise", start)
        capture.keep("sampler.x_init", start)
        tell("prefix")
        calls = 0
        for step in pipeline.denoise(request, start):
            index = step.state.index
            tell(f"step{index}")
            capture.keep(f"sampler.x_t{index}", step.state.x_t)
            capture.keep(f"sampler.timestep{index}", step.state.timestep)
            for velocity in (step.velocity_cond, step.velocity_uncond):
                if request.entry is Entry.FULL_SEQUENCE and velocity is not None:
                    capture.keep(f"velocity_call{calls}", velocity)
                    calls += 1
            capture.keep(f"sampler.velocity{index}", step.velocity)
        capture.keep("latent", step.x_next.reshape(*request.latent_grid, -1))
        frames = []
        for pixels in pipeline.decode(request, step.x_next):
            tell(f"chunk{len(frames)}")
            frames.append(pixels)
        capture.keep("pixels", mx.concatenate(frames).transpose(3, 0, 1, 2))
    return capture.recording


def layout_mlx(request: dict, tokenizer_dir: Path) -> dict[str, np.ndarray]:
    """Lay out a request with the tokenizer in a folder: int32 arrays and the float32 `timesteps` of the layouts."""
    asked = request_from_bundle(request, Entry.FULL_SEQUENCE)
    sequence = build_sequence(asked, LanceTokenizer(tokenizer_dir))
    arrays = _layout(asked, sequence, tokens_per_second=2)
    return arrays | {"timesteps": timesteps(asked.num_steps, asked.timestep_shift)}


def _layout(request: Request, sequence: Sequence, tokens_per_second: int) -> dict[str, np.ndarray]:
    """The integers of a sequence under the names of the oracles' inputs and layouts, int32."""
    frames, rows, columns = request.latent_grid
    # Upstream gives rows and columns doubled, because the function that reads them halves them.
    grids = np.array([[frames, 2 * rows, 2 * columns]], np.int32)
    arrays = {
        "text_ids": sequence.ids,
        "modality": sequence.roles,
        "split_lens": [len(segment) for segment in sequence.segments],
        "attn_modes": [segment.mode for segment in sequence.segments],
        "packed_vae_token_indexes": sequence.inner_indexes(AttentionMode.FULL_NOISE, AttentionMode.NOISE),
        "mse_loss_indexes": sequence.inner_indexes(AttentionMode.NOISE),
        "video_grid_thw": grids[None],
        "vae_video_grid_thw": grids,
        "video_sizes": [[request.num_frames, request.height, request.width]],
        "position_ids.cond": position_ids(sequence, tokens_per_second),
        "position_ids.uncond": unconditional_position_ids(sequence, tokens_per_second, Entry.FULL_SEQUENCE),
        "latent_position_ids": latent_position_ids(request.latent_grid),
    }
    return {name: np.asarray(array, np.int32) for name, array in arrays.items()}
