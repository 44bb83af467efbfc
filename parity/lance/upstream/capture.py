"""Watching upstream's model while its launcher runs: hooks and wrapped functions that keep what the oracles hold.

The names are those of parity/lance/names.py. Nothing that is computed changes, but for the randomness that is given.
"""

from collections.abc import Callable, Container, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parity.errors import ParityError
from parity.lance.retention import Retention, keep_whole
from parity.lance.upstream.namespace import Overlaid
from parity.tensors.recording import Tap
from parity.tensors.sketch import Sketch

LAYERS = "language_model.model.layers"


class Capture:
    """Keeps the taps that are wanted from one run.

    Args:
        names: which taps are kept.
        cached: whether the entry with a cache runs.
        given: float32 arrays `sampler.noise` and `vae.encode{i}.eps` that take the place of what would be drawn.
        progress: is told the name of each call.

    `watch_modules` has to come before the model is built, `watch` after that.
    """

    def __init__(
        self,
        names: Container[str],
        cached: bool,
        given: Mapping[str, np.ndarray],
        progress: Callable[[str], None],
    ) -> None:
        self.kept: dict[str, Tap | Sketch] = {}
        self._hold: Retention = keep_whole
        self._names, self._cached, self._given, self._progress = names, cached, given, progress
        self._call, self._layer, self._coding, self._encoding, self._step = "", "", "", "", 0
        self._count: dict[str, int] = {}
        self._caches: dict[int, str] = {}

    def keep(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor, or its sketch, under a name, if the name is wanted and not yet taken."""
        if name in self._names and name not in self.kept:
            self.kept[name] = self._hold(name, tensor)

    def enter(self, call: str) -> None:
        """Name what follows after a call, such as "cond.step0"."""
        self._call = call
        self._progress(call)

    def next(self, counter: str) -> int:
        """Count from 0."""
        self._count[counter] = self._count.get(counter, -1) + 1
        return self._count[counter]

    def watch_modules(self, lance: ModuleType, navit: ModuleType, vae: ModuleType) -> None:
        """Wrap functions of modeling.lance.lance, modeling.lance.qwen2_navit and modeling.vae.wan.model."""
        lance.torch = Overlaid(lance.torch, randn=self._drawing(torch.randn, lambda: "sampler.noise"))
        vae.torch = Overlaid(vae.torch, randn_like=self._drawing(torch.randn_like, lambda: f"{self._encoding}.eps"))
        rotate, attend = navit.apply_multimodal_rotary_pos_emb, navit.flash_attn_varlen_func

        def rotated(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            turned = rotate(q, k, *rest)
            for name, value in zip(("q_rope", "k_rope"), turned, strict=True):
                self._keep_in_layer(f".self_attn.{name}", value[0].transpose(0, 1))
            return turned

        def attended(**values: Any) -> Tensor:
            output = attend(**values)
            self._keep_in_layer(".self_attn.sdpa", output)
            return output

        navit.apply_multimodal_rotary_pos_emb, navit.flash_attn_varlen_func = rotated, attended

    def watch(
        self,
        model: nn.Module,
        vae: Any,
        answer_from: int | None,
        hold: Retention = keep_whole,
    ) -> None:
        """Attach hooks to a Lance and a WanVideoVAE; `answer_from` is the first token that is fed to get an answer.

        `hold` makes of a tensor what is kept under its name, by default all of it.
        """
        self._hold = hold
        language_model = model.language_model
        forward = language_model.forward_inference

        def named_forward(**values: Any) -> Any:
            self.enter(self._call_of(values, answer_from))
            self._keep_below("position_ids", values["packed_query_position_ids"][:, 0])
            self._keep_below("hidden_in", values["packed_query_sequence"])
            output = forward(**values)
            self._keep_below("hidden_out", output.packed_query_sequence)
            return output

        language_model.forward_inference = named_forward
        language_model.register_forward_pre_hook(lambda module, args: self._progress(f"pass{self.next('pass')}"))
        for name, module in language_model.model.layers.named_modules(prefix=LAYERS):
            if name.count(".") == LAYERS.count(".") + 1:
                module.register_forward_pre_hook(lambda module, args, name=name: setattr(self, "_layer", name))
            if name != LAYERS:
                module.register_forward_hook(lambda module, args, output, name=name: self._keep_below(name, output))
        model.llm2vae.register_forward_hook(self._velocity)
        model.time_embedder.register_forward_hook(self._time)
        model.vae2llm.register_forward_pre_hook(self._state)
        for name in ("validation_gen", "validation_gen_KVcache"):
            setattr(model, name, self._target_only(getattr(model, name)))
        for name in ("validation_video_to_text", "validation_und_KVcache"):
            setattr(model, name, self._answer(getattr(model, name)))
        self._watch_vit(model.vit_model)
        if vae is not None:
            self._watch_vae(vae)

    def _call_of(self, values: Mapping[str, Any], answer_from: int | None) -> str:
        """What a cached pass is: a split of an arm's prefix, a step, a split of a question or a token of its answer."""
        arm = self._caches.setdefault(id(values["past_key_values"]), ("cond", "uncond")[min(len(self._caches), 1)])
        if answer_from is not None:
            seen = int(values["key_values_lens"].sum())
            kind = "prefill" if seen < answer_from else "decode"
        else:
            kind = "prefix" if values["update_past_key_values"] else "step"
        if kind == "step":
            # The unconditional arm runs in some of the steps, after the conditional one.
            step = self.next("step") if arm == "cond" else self._count["step"]
            return f"{arm}.step{step}"
        return f"{arm}.{kind}{self.next(f'{arm}.{kind}')}"

    def _keep_below(self, path: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            self.keep(f"{self._call}/{path}", output)

    def _keep_in_layer(self, path: str, output: Tensor) -> None:
        self.keep(f"{self._call}/{self._layer}{path}", output)

    def _velocity(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._cached:
            self._keep_below("llm2vae", output)
        else:
            self.keep(f"velocity_call{self.next('velocity')}", output)

    def _time(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        # The cached entry embeds the latents once before the prefix, when nothing has been named yet.
        self._step = self.next("time") - int(self._cached)
        if self._step >= 0:
            self.keep(f"sampler.timestep{self._step}", args[0])
        if self._step == 0:
            self.keep("time_embedder", output[-1])

    def _state(self, module: nn.Module, args: tuple) -> None:
        self.keep(f"sampler.x_t{self._step}" if self._step >= 0 else "sampler.x_init", args[0])

    def _drawing(self, draw: Callable[..., Tensor], name_of: Callable[[], str]) -> Callable[..., Tensor]:
        """A function that draws numbers, or gives those that are given under a name."""

        def drawn(*args: Any, **values: Any) -> Tensor:
            result, name = draw(*args, **values), name_of()
            if name in self._given:
                array = self._given[name]
                if tuple(array.shape) != tuple(result.shape):
                    raise ParityError(f"{name} has shape {list(array.shape)}, upstream draws {list(result.shape)}")
                result = torch.from_numpy(array).to(result.device, result.dtype)
            self.keep(name, result)
            return result

        return drawn

    def _target_only(self, generate: Callable[..., tuple]) -> Callable[..., tuple]:
        """A sampling function that returns the target's latent alone, without those of clean visuals before it."""

        def generated(**values: Any) -> tuple:
            latents, *rest = generate(**values)
            return [parts[-1:] for parts in latents], *rest

        return generated

    def _answer(self, answer: Callable[..., tuple]) -> Callable[..., tuple]:
        def answered(**values: Any) -> tuple:
            sequences, *rest = answer(**values)
            self.keep("tokens", sequences[0][:, 0])
            return sequences, *rest

        return answered

    def _watch_vit(self, tower: nn.Module) -> None:
        tower.register_forward_pre_hook(lambda module, args: self.enter(f"vit_model{self.next('vit')}"), prepend=True)
        for name, module in tower.named_modules():
            path = f".{name}" if name else ""

            def record(module: nn.Module, args: tuple, output: object, path: str = path) -> None:
                if isinstance(output, Tensor):
                    self.keep(f"vit_model{self._count['vit']}{path}", output)

            module.register_forward_hook(record)

    def _watch_vae(self, vae: Any) -> None:
        coder = vae.vae.model
        for part in ("encoder", "decoder"):
            whole = coder.get_submodule(part)
            whole.register_forward_pre_hook(lambda *seen: self.enter(f"{self._coding}.chunk{self.next('chunk')}"))
            for name, module in whole.named_modules(prefix=part):
                module.register_forward_hook(lambda module, args, output, name=name: self._keep_below(name, output))
        encode, encode_all, decode_all = vae.vae.encode, vae.vae_encode, vae.vae_decode

        def encoded(video: Tensor) -> tuple[Tensor, Tensor]:
            self._encoding = self._coding = f"vae.encode{self.next('encode')}"
            self._count.pop("chunk", None)
            mean, logvar = encode(video)
            self.keep(f"{self._coding}.mean", mean)
            self.keep(f"{self._coding}.logvar", logvar)
            return mean, logvar

        def encoded_all(samples: list[Tensor], **values: Any) -> list[Tensor]:
            latents = encode_all(samples, **values)
            for index, latent in enumerate(latents):
                self.keep(f"vae.latent{index}", latent)
            return latents

        def decoded_all(latents: list[Tensor], **values: Any) -> list[Tensor]:
            self._coding = "vae.decode"
            self._count.pop("chunk", None)
            self.keep("latent", latents[0])
            pixels = decode_all(latents, **values)
            self.keep("pixels", pixels[0])
            return pixels

        vae.vae.encode, vae.vae_encode, vae.vae_decode = encoded, encoded_all, decoded_all
