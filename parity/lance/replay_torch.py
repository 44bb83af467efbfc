"""Replaying a request on the reference, whole or one call of it, and laying out requests with it."""

import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parity.lance.capture_torch import Reached, TorchCapture
from parity.lance.names import parse, velocity_calls
from parity.lance.retention import Retention, keep_whole
from parity.tensors.recording import Replay, Tap
from parity.tensors.sketch import Sketch
from reference.arms import Inputs, build_arms
from reference.errors import ReferenceError
from reference.layout import Layout, VisualSize
from reference.media import visual_sizes
from reference.model import Pipeline
from reference.preprocess import preprocess
from reference.prompt import Tokenizer
from reference.request import Request
from reference.sampler import denoise, is_guided, start, time_grid
from reference.sequence import build_layout
from reference.understanding import Reader, answer, build_reader
from reference.vae import Posterior
from reference.vae_layers import LATENT_CHANNELS

# Answer tokens whose positions a question's layout holds when its request names no number.
LAYOUT_TOKENS = 16
# Values of a ViT patch: two frames of 14x14 pixels in three colours.
PATCH_VALUES = 3 * 2 * 14 * 14


@dataclass(frozen=True)
class TorchReplay:
    """A request on a loaded reference with the randomness and the visuals that it is to be replayed with."""

    pipeline: Pipeline
    request: Request
    entry: str
    replay: Replay

    @cached_property
    def layout(self) -> Layout:
        """The request's sequence."""
        return self.pipeline.layout(self.request, replayed_sizes(self.request, self.replay))

    @cached_property
    def guided(self) -> list[bool]:
        """Whether each step is guided; empty for questions."""
        if self.request.understanding:
            return []
        times = time_grid(self.request.num_steps, self.request.timestep_shift)[:-1]
        return [self.request.guided and is_guided(t, *self.request.cfg_interval) for t in times]

    def capture(
        self,
        names: Container[str] | None = None,
        progress: Callable[[str], None] | None = None,
        force: Mapping[str, Tap] | None = None,
        until: str | None = None,
        hold: Retention = keep_whole,
    ) -> TorchCapture:
        """A capture of this replay; see TorchCapture."""
        guided = self.guided if self.entry == "full_sequence" else None
        return TorchCapture(self.pipeline, names, progress, force, until, guided, hold)

    def record(
        self,
        names: Container[str] | None = None,
        progress: Callable[[str], None] | None = None,
        force: Mapping[str, Tap] | None = None,
        hold: Retention = keep_whole,
    ) -> dict[str, Tap | Sketch]:
        """Run the whole request; with `force` every part of it from the given values."""
        with torch.inference_mode(), self.capture(names, progress, force, hold=hold) as capture:
            for name, array in self.layout.arrays().items():
                capture.keep(name, torch.from_numpy(array))
            inputs = self.pipeline.inputs(self.layout, look(self, capture))
            if self.request.understanding:
                reader, limit = build_reader(inputs, self.pipeline.tokenizer, self.entry, self.request.max_new_tokens)
                chosen = steered(capture.follow_reader(reader), capture, len(self.pipeline.tokenizer))
                tokens = list(answer(reader, inputs, self.pipeline.tokenizer, limit))
                capture.keep("tokens", torch.tensor([*chosen, *tokens[len(chosen) :]], dtype=torch.int32))
            else:
                self._generate(inputs, capture)
        return capture.recording

    def recompute(self, name: str, force: Mapping[str, Tap]) -> np.ndarray | None:
        """Compute one tap anew from the forced values before it, running only its call; None if it never comes."""
        tap = parse(name)
        with torch.inference_mode(), self.capture({name}, force=force, until=name) as capture:
            try:
                self._run_call(tap.call, tap.numbers, capture, force)
            except Reached:
                pass
        found = capture.recording.get(name)
        return None if found is None else found.array

    def _run_call(self, call: str, numbers: dict[str, int], capture: TorchCapture, force: Mapping[str, Tap]) -> None:
        if call == "velocity":
            # The full-sequence entry numbers the velocities of its arms as they come.
            arm, step = velocity_calls(self.guided)[numbers["number"]]
            call, numbers = f"{arm}.step{step}", {"step": step}
        if call.startswith("vit_model"):
            look(self, capture)
        elif call.startswith("vae.encode"):
            encode(self, capture, only=numbers["index"])
        elif call.startswith("vae.decode"):
            decode(self, self._forced(force, "latent"), capture)
        elif self.request.understanding:
            self._read_call(call, numbers, capture, force)
        else:
            inputs = self.pipeline.inputs(self.layout, self._forced_vit(force))
            noise = self._forced(force, "sampler.noise").to(self.pipeline.numerics.torch_dtype)
            x_init = self._forced(force, "sampler.x_init")
            x_init = noise if x_init is None else x_init.to(noise.dtype)
            self._denoise_call(call, numbers, inputs, x_init, capture, force)

    def _denoise_call(
        self,
        call: str,
        numbers: dict[str, int],
        inputs: Inputs,
        x_init: Tensor,
        capture: TorchCapture,
        force: Mapping[str, Tap],
    ) -> None:
        if call == "sampler":
            self._generate(inputs, capture)
            return
        name = call.partition(".")[0]
        arms = {arm.name: capture.follow(arm) for arm in build_arms(inputs, self.request, self.entry, x_init) if arm}
        arm = arms[name]
        for index in range(min(arm.prefixes, numbers.get("index", arm.prefixes - 1) + 1)):
            arm.prefill(index)
        if "step" in numbers:
            step = numbers["step"]
            x_t = self._forced(force, f"sampler.x_t{step}").to(x_init.dtype)
            arm.velocity(step, x_t, self._forced(force, f"sampler.timestep{step}"))

    def _read_call(self, call: str, numbers: dict[str, int], capture: TorchCapture, force: Mapping[str, Tap]) -> None:
        inputs = self.pipeline.inputs(self.layout, self._forced_vit(force))
        reader, _ = build_reader(inputs, self.pipeline.tokenizer, self.entry, self.request.max_new_tokens)
        reader = capture.follow_reader(reader)
        for index in range(reader.prefixes):
            reader.prefill(index)
        tokens = [int(self.layout.text_ids[self.layout.answer - 1]), *force["tokens"].array.tolist()]
        for step in range(numbers.get("step", 0) + 1):
            reader.logits(step, tokens[step])

    def _forced(self, force: Mapping[str, Tap], name: str) -> Tensor | None:
        return torch.tensor(force[name].array).to(self.pipeline.device) if name in force else None

    def _forced_vit(self, force: Mapping[str, Tap]) -> Tensor | None:
        vit = self._forced(force, "vit_model0")
        return None if vit is None else vit.to(self.pipeline.numerics.torch_dtype)

    def _generate(self, inputs: Inputs, capture: TorchCapture) -> None:
        layout = self.layout
        expected = (len(layout.latent_rows), LATENT_CHANNELS)
        given = self.replay.noise
        if given is None or given.shape != expected:
            shape = None if given is None else given.shape
            raise ReferenceError(f"the noise has shape {shape}, the request needs {expected}")
        noise = torch.from_numpy(np.array(given, np.float32))
        noise = noise.to(self.pipeline.device, self.pipeline.numerics.torch_dtype)
        capture.keep("sampler.noise", noise)
        clean = encode(self, capture)
        if clean is not None and clean.shape != noise.shape:
            raise ReferenceError(f"the pixels make latents of shape {tuple(clean.shape)}, the request needs {expected}")
        x_init = capture.observe("sampler.x_init", start(noise, clean, inputs.made))
        cond, uncond = (capture.follow(arm) for arm in build_arms(inputs, self.request, self.entry, x_init))
        capture.last_step = self.request.num_steps - 1
        latents = x_init
        for step in denoise(cond, uncond, x_init, self.request):
            capture.keep(f"sampler.x_t{step.index}", step.x_t)
            capture.keep(f"sampler.timestep{step.index}", step.timestep)
            capture.keep(f"sampler.velocity{step.index}", step.velocity)
            latents = step.x_next
        grid = layout.target.grid
        latent = latents[-grid.size :].unflatten(0, (grid.frames, grid.rows, grid.columns))
        decode(self, capture.observe("latent", latent), capture)


def steered(reader: Reader, capture: TorchCapture, vocabulary: int) -> list[int]:
    """Let a reader answer the forced tokens; returns a list that gets those which its own logits would choose."""
    tokens = capture.force.get("tokens")
    own: list[int] = []
    if tokens is None:
        return own
    logits = reader.logits

    def chosen(index: int, token: int) -> Tensor:
        computed = logits(index, token)
        if index >= len(tokens.array):
            return computed
        own.append(int(computed[:vocabulary].argmax()))
        choice = torch.zeros_like(computed)
        choice[int(tokens.array[index])] = 1
        return choice

    reader.logits = chosen
    return own


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


def look(run: TorchReplay, capture: TorchCapture) -> Tensor | None:
    """The vision tower's tokens of all visuals, in one call as upstream's; None where it sees none."""
    if not run.layout.vit_splits:
        return None
    capture.enter("vit_model0")
    capture.follow_vit("vit_model0")
    patches = torch.from_numpy(np.concatenate(run.replay.vit_patches)).to(run.pipeline.device)
    return run.pipeline.vit_model(patches, run.replay.vit_grids)


def encode(run: TorchReplay, capture: TorchCapture, only: int | None = None) -> Tensor | None:
    """Clean latents [latents, 48] of all given pixels, the target's placeholder included; None where there are none.

    `only` names the one visual to encode.
    """
    parts, device = [], run.pipeline.device
    for index, (pixels, eps) in enumerate(zip(run.replay.vae_pixels, run.replay.eps, strict=True)):
        if only not in (None, index):
            continue
        frames = run.pipeline.vae.encode_frames(torch.from_numpy(pixels).to(device))
        chunks: list[Posterior] = []
        for chunk in range((pixels.shape[1] - 1) // 4 + 1):
            capture.enter(f"vae.encode{index}.chunk{chunk}")
            chunks.append(next(frames))
        joined, noise = Posterior.join(chunks), torch.from_numpy(eps).to(device)
        name = f"vae.encode{index}"
        posterior = Posterior(
            capture.observe(f"{name}.mean", joined.mean), capture.observe(f"{name}.logvar", joined.logvar)
        )
        capture.keep(f"{name}.eps", noise)
        parts.append(capture.observe(f"vae.latent{index}", posterior.sample(noise)).flatten(0, 2))
    return torch.cat(parts) if parts else None


def decode(run: TorchReplay, latent: Tensor, capture: TorchCapture) -> None:
    """Decode a latent [t, h, w, 48] frame by frame and record the pixels."""
    decoding = run.pipeline.vae.decode_frames(latent)
    chunks = []
    for index in range(len(latent)):
        capture.enter(f"vae.decode.chunk{index}")
        chunks.append(next(decoding))
    pixels = capture.observe("pixels", torch.cat(chunks, 1))
    capture.keep("frames", ((pixels / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.int32))


def preprocess_reference(request: Request, media: Path) -> dict[str, np.ndarray] | None:
    """The visuals of a request as the reference prepares them, by the names of the bundles' inputs.

    None where there are none or their files are not below `media`. Raises ReferenceError for a file that is unreadable.
    """
    if not request.visuals or not all(os.path.isfile(media / element.content) for element in request.visuals):
        return None
    arrays = {}
    for index, visual in enumerate(preprocess(request, media)):
        arrays |= {f"vae_pixels{index}": visual.vae_pixels, f"vit_patches{index}": visual.vit_patches}
    return {name: array for name, array in arrays.items() if array is not None}


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
