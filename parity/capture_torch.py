"""Recording the reference: forward hooks attached from outside, and the replay of a request."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parity.recording import Recording, Replay, Tap
from reference.arms import Inputs, build_arms
from reference.errors import ReferenceError
from reference.layout import Layout, VisualSize
from reference.media import visual_sizes
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.prompt import Tokenizer
from reference.request import Request
from reference.sampler import Arm, denoise, start, time_grid
from reference.sequence import build_layout
from reference.understanding import Reader, answer, build_reader
from reference.vae import Posterior
from reference.vae_layers import LATENT_CHANNELS

# Answer tokens whose positions a question's layout holds when its request names no number.
LAYOUT_TOKENS = 16
# Values of a ViT patch: two frames of 14x14 pixels in three colours.
PATCH_VALUES = 3 * 2 * 14 * 14
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
        model = self._pipeline.model
        language_model = model.language_model
        self._handles.append(language_model.register_forward_pre_hook(self._inputs, with_kwargs=True))
        for name, module in language_model.model.layers.named_modules(prefix="language_model.model.layers"):
            if name != "language_model.model.layers":
                self._watch(module, name)
        self._watch(language_model, "hidden_out")
        self._watch(model.llm2vae, "llm2vae")
        self._handles.append(model.time_embedder.register_forward_hook(self._time))
        for name, module in self._pipeline.vae.named_modules():
            if name.startswith(("encoder", "decoder")):
                self._watch(module, name)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def follow_vit(self, call: str) -> None:
        """Watch the vision tower too, whose parts are named after the call and not below it."""
        tower = self._pipeline.vit_model
        self._watch(tower, call, below=False)
        for name, module in tower.named_modules(prefix=call):
            if name != call:
                self._watch(module, name, below=False)

    def follow_reader(self, reader: Reader) -> Reader:
        """Wrap a reader's prefill and logits so that what happens inside is named after the call."""
        prefill, logits = reader.prefill, reader.logits

        def named_prefill(index: int) -> None:
            self.enter(f"{reader.name}.prefill{index}")
            prefill(index)

        def named_logits(index: int, token: int) -> Tensor:
            self.enter(f"{reader.name}.decode{index}")
            return logits(index, token)

        reader.prefill, reader.logits = named_prefill, named_logits
        return reader

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

    def _watch(self, module: nn.Module, name: str, below: bool = True) -> None:
        def record(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                self.keep(f"{self._call}/{name}" if below else name, output)

        self._handles.append(module.register_forward_hook(record))

    def _inputs(self, module: nn.Module, args: tuple, values: dict) -> None:
        self.keep(f"{self._call}/hidden_in", values["inputs_embeds"])
        self.keep(f"{self._call}/position_ids", values["position_ids"])

    def _time(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        # A prefix of clean latents is embedded at t = 0 first.
        if ".step" in self._call:
            self.keep("time_embedder", output[-1])


def record_reference(
    checkpoint_dir: Path,
    variant: str,
    request: dict,
    entry: str,
    replay: Replay,
    numerics: Numerics,
    names: set[str] | None = None,
    progress: Callable[[str], None] | None = None,
    device: str = "cpu",
) -> Recording:
    """Replay a request on the reference from given randomness and preprocessed visuals, and record it.

    `entry` is "kv_cache" or "full_sequence". Beside the oracles' taps the recording holds the layout's integers under
    their names in inputs.safetensors and `sampler.velocity{k}`, the velocity after guidance. `progress` is told the
    name of each call before it runs. `device` is PyTorch's name of one. Raises ReferenceError for bad input.
    """
    pipeline = Pipeline.load(checkpoint_dir, variant, numerics, device)
    return record_pipeline(pipeline, Request.from_dict(request), entry, replay, names, progress)


def record_pipeline(
    pipeline: Pipeline,
    request: Request,
    entry: str,
    replay: Replay,
    names: set[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Recording:
    """Replay a request on a loaded reference; see record_reference."""
    layout = pipeline.layout(request, replayed_sizes(request, replay))
    with torch.inference_mode(), TorchCapture(pipeline, names, progress) as capture:
        for name, array in layout.arrays().items():
            capture.keep(name, torch.from_numpy(array))
        inputs = pipeline.inputs(layout, look(pipeline, layout, replay, capture))
        if request.understanding:
            reader, limit = build_reader(inputs, pipeline.tokenizer, entry, request.max_new_tokens)
            tokens = list(answer(capture.follow_reader(reader), inputs, pipeline.tokenizer, limit))
            capture.keep("tokens", torch.tensor(tokens, dtype=torch.int32))
        else:
            record_generation(pipeline, request, entry, replay, inputs, capture)
    return capture.recording


def replayed_sizes(request: Request, replay: Replay) -> list[VisualSize]:
    """Sizes of a request's visuals as they were given to the run; raises ReferenceError when some are missing."""
    count = len(request.visuals)
    # Of an i2v's images only the target's pixels are given, whose size is the image's.
    edited = 0 if request.task == "i2v" or request.understanding else count
    encoded = edited + 1 if count and not request.understanding else 0
    looked_at = count if request.task != "i2v" else 0
    given = (len(replay.vae_pixels), len(replay.eps), len(replay.vit_patches), len(replay.vit_grids))
    if given != (encoded, encoded, looked_at, looked_at):
        raise ReferenceError(
            f"a replay of {request.task} with {count} visuals needs {encoded} vae_pixels and eps and {looked_at} "
            f"vit_patches and vit_grids, there are {', '.join(map(str, given))}"
        )
    sizes = []
    for index in range(count):
        pixels = replay.vae_pixels[index if edited else 0].shape[1:] if encoded else None
        sizes.append(VisualSize(pixels, replay.vit_grids[index] if looked_at else None))
    return sizes


def look(pipeline: Pipeline, layout: Layout, replay: Replay, capture: TorchCapture) -> Tensor | None:
    """The vision tower's tokens of all visuals, in one call as upstream's; None where it sees none."""
    if not layout.vit_splits:
        return None
    capture.enter("vit_model0")
    capture.follow_vit("vit_model0")
    patches = torch.from_numpy(np.concatenate(replay.vit_patches)).to(pipeline.device)
    return pipeline.vit_model(patches, replay.vit_grids)


def encode(pipeline: Pipeline, replay: Replay, capture: TorchCapture) -> Tensor | None:
    """Clean latents [latents, 48] of all given pixels, the target's placeholder included; None where there are none."""
    parts = []
    for index, (pixels, eps) in enumerate(zip(replay.vae_pixels, replay.eps, strict=True)):
        frames = pipeline.vae.encode_frames(torch.from_numpy(pixels).to(pipeline.device))
        chunks: list[Posterior] = []
        for chunk in range((pixels.shape[1] - 1) // 4 + 1):
            capture.enter(f"vae.encode{index}.chunk{chunk}")
            chunks.append(next(frames))
        posterior, noise = Posterior.join(chunks), torch.from_numpy(eps).to(pipeline.device)
        latent = posterior.sample(noise)
        for name, tensor in (("mean", posterior.mean), ("logvar", posterior.logvar), ("eps", noise)):
            capture.keep(f"vae.encode{index}.{name}", tensor)
        capture.keep(f"vae.latent{index}", latent)
        parts.append(latent.flatten(0, 2))
    return torch.cat(parts) if parts else None


def record_generation(
    pipeline: Pipeline, request: Request, entry: str, replay: Replay, inputs: Inputs, capture: TorchCapture
) -> None:
    """Encode, denoise and decode, and record it."""
    layout = inputs.layout
    expected = (len(layout.latent_rows), LATENT_CHANNELS)
    if replay.noise is None or replay.noise.shape != expected:
        given = None if replay.noise is None else replay.noise.shape
        raise ReferenceError(f"the noise has shape {given}, the request needs {expected}")
    noise = torch.from_numpy(np.array(replay.noise, np.float32)).to(pipeline.device, pipeline.numerics.torch_dtype)
    capture.keep("sampler.noise", noise)
    clean = encode(pipeline, replay, capture)
    if clean is not None and clean.shape != noise.shape:
        raise ReferenceError(f"the pixels make latents of shape {tuple(clean.shape)}, the request needs {expected}")
    x_init = start(noise, clean, inputs.made)
    capture.keep("sampler.x_init", x_init)
    cond, uncond = (capture.follow(arm) for arm in build_arms(inputs, request, entry, x_init))
    calls = 0
    latents = x_init
    for step in denoise(cond, uncond, x_init, request):
        capture.keep(f"sampler.x_t{step.index}", step.x_t)
        capture.keep(f"sampler.timestep{step.index}", step.timestep)
        if entry == "full_sequence":
            for velocity in (step.velocity_cond, step.velocity_uncond):
                if velocity is not None:
                    capture.keep(f"velocity_call{calls}", velocity)
                    calls += 1
        capture.keep(f"sampler.velocity{step.index}", step.velocity)
        latents = step.x_next
    grid = layout.target.grid
    latent = latents[-grid.size :].unflatten(0, (grid.frames, grid.rows, grid.columns))
    capture.keep("latent", latent)
    decoding = pipeline.vae.decode_frames(latent)
    chunks = []
    for index in range(grid.frames):
        capture.enter(f"vae.decode.chunk{index}")
        chunks.append(next(decoding))
    capture.keep("pixels", torch.cat(chunks, 1))


def layout_reference(request: dict, tokenizer_dir: Path, media: Path | None = None) -> dict[str, np.ndarray]:
    """Lay out a request with the tokenizer in a folder: int32 arrays and the float32 `timesteps` of the layouts.

    `media` is the folder that the paths of visuals start from.
    """
    asked = Request.from_dict({"max_new_tokens": LAYOUT_TOKENS} | request)
    sizes = visual_sizes(asked, media or Path())
    layout = build_layout(asked, Tokenizer(tokenizer_dir), sizes)
    arrays = layout.arrays()
    seen = [size.vit for size in sizes if size.vit]
    if seen:
        arrays["vit_patch_shapes"] = np.array([(t * h * w, PATCH_VALUES) for t, h, w in seen], np.int32)
    if asked.understanding:
        arrays["position_ids.cond"] = layout.continued_position_ids(asked.max_new_tokens)
        arrays["context_len"] = np.array([layout.answer - 1], np.int32)
        return arrays
    if asked.visuals:
        arrays["vae_pixel_shapes"] = np.array([(3, *split.size) for split in layout.latent_splits], np.int32)
    return {**arrays, "timesteps": time_grid(asked.num_steps, asked.timestep_shift).numpy()}
