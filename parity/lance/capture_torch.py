"""Recording and steering the reference: forward hooks and two wrapped functions, attached from outside."""

from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import reference.sampler
from parity.lance.names import velocity_calls
from parity.lance.retention import Retention, keep_whole
from parity.tensors.recording import DTYPES, Recording, Tap
from reference.model import Pipeline
from reference.sampler import Arm
from reference.understanding import Reader

EMBED_TOKENS = "language_model.model.embed_tokens"
HEAD = "language_model.lm_head"
NORMS = ("language_model.model.norm", "language_model.model.norm_moe_gen")


class Reached(Exception):
    """Ends a replay that was asked for one tap only."""


def frames_second(frames: Tensor) -> Tensor:
    """Frame by frame activations [T, C, H, W] of the VAE as the [1, C, T, H, W] of all its other taps, and back."""
    return frames.transpose(0, 1)[None] if frames.ndim == 4 else frames[0].transpose(0, 1)


class TorchCapture:
    """Context manager that records what a loaded reference computes, under the oracles' tap names.

    Args:
        names: limits what is kept; None keeps everything.
        force: taps whose values replace what is computed, after that was recorded: all that follows sees them.
        until: the tap after which `Reached` is raised.
        guided: for the full-sequence entry, whether each step is guided: it numbers the velocities.
        hold: makes of a tap's name and tensor what is recorded.

    `last_step` is the number of the last denoising step, whose result is no state of another one. Nothing of the model
    changes. The hooks have to know which call they are in: `follow` and `enter` say so, and tell
    `progress`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        names: Container[str] | None = None,
        progress: Callable[[str], None] | None = None,
        force: Mapping[str, Tap] | None = None,
        until: str | None = None,
        guided: list[bool] | None = None,
        hold: Retention = keep_whole,
    ) -> None:
        self.recording: Recording = {}
        self.force = force or {}
        self._pipeline, self._names, self._progress, self._until = pipeline, names, progress, until
        self._hold = hold
        self._velocities = {call: i for i, call in enumerate(velocity_calls(guided or []))}
        self._call, self._step = "", 0
        self.last_step: int | None = None
        self._stack = ExitStack()

    @property
    def call(self) -> str:
        """The name of the call that what follows belongs to."""
        return self._call

    def keep(self, name: str, tensor: Tensor) -> None:
        """Record a tensor under a name, if the name is wanted and not yet taken."""
        if (self._names is None or name in self._names) and name not in self.recording:
            self.recording[name] = self._hold(name, tensor)
            if name == self._until:
                raise Reached(name)

    def observe(self, name: str, tensor: Tensor) -> Tensor:
        """Record a tensor and return what is to be used in its place: the forced value, or the tensor itself."""
        self.keep(name, tensor)
        given = self.force.get(name)
        if given is None:
            return tensor
        exact = tensor.dtype is torch.float64
        return torch.tensor(given.array).to(tensor.device, torch.float64 if exact else DTYPES[given.dtype])

    def __enter__(self) -> "TorchCapture":
        model = self._pipeline.model
        language_model = model.language_model
        self._handle(language_model.register_forward_pre_hook(self._inputs, with_kwargs=True))
        for name, module in language_model.model.layers.named_modules(prefix="language_model.model.layers"):
            if name != "language_model.model.layers":
                self._watch(module, name)
        for name in (*NORMS, HEAD, "vae2llm", "latent_pos_embed", "llm2vae"):
            self._watch(model.get_submodule(name), name)
        self._watch(language_model, "hidden_out")
        self._handle(language_model.model.embed_tokens.register_forward_hook(self._embedded))
        self._handle(model.time_embedder.register_forward_hook(self._time))
        for name, module in self._pipeline.vae.named_modules():
            if name.startswith(("encoder", "decoder", "conv")):
                self._watch(module, name, frames=True)
        self._stack.enter_context(patch.object(reference.sampler, "guide", self._guide(reference.sampler.guide)))
        self._stack.enter_context(patch.object(reference.sampler, "advance", self._advance(reference.sampler.advance)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def follow_vit(self, call: str) -> None:
        """Watch the vision tower too, whose parts are named after the call and not below it."""
        tower = self._pipeline.vit_model
        for name, module in tower.named_modules(prefix=call):
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
            self._step = step
            output = velocity(step, x_t, timestep)
            number = self._velocities.get((arm.name, step))
            return output if number is None else self.observe(f"velocity_call{number}", output)

        arm.prefill, arm.velocity = named_prefill, named_velocity
        return arm

    def enter(self, call: str) -> None:
        """Name what follows after a call, such as "cond.step0"."""
        self._call = call
        if self._progress:
            self._progress(call)

    def _handle(self, handle: object) -> None:
        self._stack.callback(handle.remove)

    def _watch(self, module: nn.Module, name: str, below: bool = True, frames: bool = False) -> None:
        def record(module: nn.Module, args: tuple, output: object) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            full = f"{self._call}/{name}" if below else name
            if frames and output.ndim == 4:
                return frames_second(self.observe(full, frames_second(output)))
            return self.observe(full, output)

        self._handle(module.register_forward_hook(record))

    def _inputs(self, module: nn.Module, args: tuple, values: dict) -> tuple[tuple, dict]:
        seen = {
            "position_ids": self.observe(f"{self._call}/position_ids", values["position_ids"]),
            "inputs_embeds": self.observe(f"{self._call}/hidden_in", values["inputs_embeds"]),
        }
        return args, values | seen

    def _embedded(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        # What a full-sequence reader embeds when it is made, before any call of an arm, belongs to none.
        if self._call.startswith(("cond.", "uncond.")):
            # The pads' rows are replaced by contents: the others are the text and the brackets.
            self.keep(f"{self._call}/{EMBED_TOKENS}", output[args[0] != self._pipeline.tokenizer.video_pad])

    def _time(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        # Few distinct times occur: a row for each, in rising order.
        _, first = np.unique(args[0].cpu().numpy(), return_index=True)
        self.keep(f"{self._call}/time_embedder", output[torch.from_numpy(first)])
        # A prefix of clean latents is embedded at t = 0 first.
        if ".step" in self._call:
            self.keep("time_embedder", output[-1])

    def _guide(self, guide: Callable) -> Callable:
        def guided(cond: Tensor, uncond: Tensor, request: object) -> Tensor:
            return self.observe(f"sampler.velocity{self._step}", guide(cond, uncond, request))

        return guided

    def _advance(self, advance: Callable) -> Callable:
        def advanced(x_t: Tensor, *rest: Tensor) -> Tensor:
            x_next = advance(x_t, *rest)
            # What the last step makes is recorded as the latent.
            return x_next if self._step == self.last_step else self.observe(f"sampler.x_t{self._step + 1}", x_next)

        return advanced
