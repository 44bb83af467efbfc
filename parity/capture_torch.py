"""Recording the reference: forward hooks attached from outside, and the replay of a request."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parity.recording import Recording, Tap
from reference.layout import Layout, build_layout
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.prompt import Tokenizer
from reference.request import Request
from reference.sampler import Arm, denoise, time_grid

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int32: "int32"}


def to_tap(tensor: Tensor) -> Tap:
    """Hold a tensor as a tap: bfloat16 values as float32, integers as int32."""
    tensor = tensor.detach().to("cpu", copy=True)
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.int32)
    name = DTYPE_NAMES[tensor.dtype]
    return Tap((tensor.float() if name == "bfloat16" else tensor).contiguous().numpy(), name)


class TorchCapture:
    """Context manager that records what a loaded reference computes, under the oracles' tap names.

    `names` limits what is kept (None keeps everything); nothing of the model changes. The hooks have to know which
    call they are in: `follow` and `enter` say so, and tell `progress`.
    """

    def __init__(
        self, pipeline: Pipeline, names: set[str] | None = None, progress: Callable[[str], None] | None = None
    ) -> None:
        self.recording: Recording = {}
        self._pipeline, self._names, self._progress = pipeline, names, progress
        self._call = ""
        self._handles: list[RemovableHandle] = []

    def keep(self, name: str, tensor: Tensor) -> None:
        """Record a tensor under a name, if the name is wanted and not yet taken."""
        if (self._names is None or name in self._names) and name not in self.recording:
            self.recording[name] = to_tap(tensor)

    def __enter__(self) -> "TorchCapture":
        model, decoder = self._pipeline.model, self._pipeline.vae.decoder
        language_model = model.language_model
        self._handles.append(language_model.register_forward_pre_hook(self._inputs, with_kwargs=True))
        for name, module in language_model.model.layers.named_modules(prefix="language_model.model.layers"):
            if name != "language_model.model.layers":
                self._watch(module, name)
        self._watch(language_model, "hidden_out")
        self._watch(model.llm2vae, "llm2vae")
        self._handles.append(model.time_embedder.register_forward_hook(self._time))
        for name, module in decoder.named_modules(prefix="decoder"):
            self._watch(module, name)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def follow(self, arm: Arm | None) -> Arm | None:
        """Wrap an arm's prefill and velocity so that what happens inside is named after the call."""
        if arm is None:
            return None
        prefill, velocity = arm.prefill, arm.velocity

        def named_prefill(index: int) -> None:
            self.enter(f"{arm.name}.prefix{index}")
            prefill(index)

        def named_velocity(step: int, x_t: Tensor, timestep: Tensor) -> Tensor:
            self.enter(f"{arm.name}.step{step}")
            return velocity(step, x_t, timestep)

        arm.prefill, arm.velocity = named_prefill, named_velocity
        return arm

    def enter(self, call: str) -> None:
        """Name what follows after a call, such as "cond.step0"."""
        self._call = call
        if self._progress:
            self._progress(call)

    def _watch(self, module: nn.Module, name: str) -> None:
        def record(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                self.keep(f"{self._call}/{name}", output)

        self._handles.append(module.register_forward_hook(record))

    def _inputs(self, module: nn.Module, args: tuple, values: dict) -> None:
        self.keep(f"{self._call}/hidden_in", values["inputs_embeds"])
        self.keep(f"{self._call}/position_ids", values["position_ids"])

    def _time(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.keep("time_embedder", output[-1])


def record_reference(
    checkpoint_dir: Path,
    variant: str,
    request: dict,
    entry: str,
    noise: np.ndarray,
    numerics: Numerics,
    names: set[str] | None = None,
    progress: Callable[[str], None] | None = None,
    device: str = "cpu",
) -> Recording:
    """Replay a request on the reference from given noise, float32 [latents, 48], and record it.

    `entry` is "kv_cache" or "full_sequence". Beside the oracles' taps the recording holds the layout's integers under
    their names in inputs.safetensors and `sampler.velocity{k}`, the velocity after guidance. `progress` is told the
    name of each call before it runs. `device` is PyTorch's name of one. Raises ReferenceError for bad input.
    """
    pipeline = Pipeline.load(checkpoint_dir, variant, numerics, device)
    return record_pipeline(pipeline, Request.from_dict(request), entry, noise, names, progress)


def record_pipeline(
    pipeline: Pipeline,
    request: Request,
    entry: str,
    noise: np.ndarray,
    names: set[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Recording:
    """Replay a request on a loaded reference; see record_reference."""
    layout = pipeline.layout(request)
    start = torch.from_numpy(np.array(noise, np.float32)).to(pipeline.device, pipeline.numerics.torch_dtype)
    with TorchCapture(pipeline, names, progress) as capture:
        for name, array in layout.arrays().items():
            capture.keep(name, torch.from_numpy(array))
        capture.keep("sampler.noise", start)
        capture.keep("sampler.x_init", start)
        cond, uncond = (capture.follow(arm) for arm in pipeline.arms(request, layout, entry))
        calls = 0
        latent = start
        for step in denoise(cond, uncond, start, request):
            capture.keep(f"sampler.x_t{step.index}", step.x_t)
            capture.keep(f"sampler.timestep{step.index}", step.timestep)
            if entry == "full_sequence":
                for velocity in (step.velocity_cond, step.velocity_uncond):
                    if velocity is not None:
                        capture.keep(f"velocity_call{calls}", velocity)
                        calls += 1
            capture.keep(f"sampler.velocity{step.index}", step.velocity)
            latent = step.x_next
        latent = latent.unflatten(0, (layout.grid.frames, layout.grid.rows, layout.grid.columns))
        capture.keep("latent", latent)
        decoding = pipeline.vae.decode_frames(latent)
        chunks = []
        for index in range(layout.grid.frames):
            capture.enter(f"vae.decode.chunk{index}")
            chunks.append(next(decoding))
        capture.keep("pixels", torch.cat(chunks, 1))
    return capture.recording


def layout_reference(request: dict, tokenizer_dir: Path) -> dict[str, np.ndarray]:
    """Lay out a request with the tokenizer in a folder: int32 arrays and the float32 `timesteps` of the layouts."""
    checked = Request.from_dict(request)
    layout: Layout = build_layout(checked, Tokenizer(tokenizer_dir))
    times = time_grid(checked.num_steps, checked.timestep_shift).numpy()
    return {**layout.arrays(), "timesteps": times}
