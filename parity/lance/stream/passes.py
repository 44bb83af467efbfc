"""The passes of the reference between two layers, and what it does before the first layer and after the last."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from parity.lance.capture_torch import TorchCapture
from parity.lance.names import parse
from parity.lance.replay_torch import TorchReplay
from parity.lance.stream.parts import GUIDED, HEAD_TAPS, Except
from parity.tensors.recording import Recording, Tap
from reference.arms import Inputs, build_arms
from reference.mot import KVCache, Pass
from reference.sampler import guide, start, time_grid
from reference.transformer import Lance
from reference.understanding import build_reader

SAMPLED_ROWS = 64
"""Rows of a long pass that variants compute: what rounding does to a row it does to the others."""
_LATER = Except(HEAD_TAPS)
_ONCE = (".self_attn", ".q_rope", ".k_rope", ".sdpa")


class _Noted(Exception):
    """Ends a call of the language model, of which only the arguments were wanted."""


@dataclass(frozen=True, eq=False)
class TorchPass:
    """A pass over one segment, between two layers: its rows so far, and what every layer is given beside them.

    Attributes:
        call: its name.
        rows: [n, hidden].
        position_ids: [3, n].
        gen: bool [n], the rows of the generation expert.
        mask: bool [n, past + n], None where all is seen.
        keep: whether later passes of the arm see it.
        raise_qk: whether queries and keys are normed in float32.
    """

    call: str
    rows: Tensor
    position_ids: Tensor
    gen: Tensor
    mask: Tensor | None
    keep: bool
    raise_qk: bool

    @property
    def arm(self) -> str:
        """The arm whose cache the pass reads."""
        return self.call.partition(".")[0]

    @property
    def sample(self) -> Tensor:
        """The rows that variants compute, rising: all of a short or causal pass, else both ends and some between."""
        n = len(self.rows)
        if self.mask is not None or n <= SAMPLED_ROWS:
            return torch.arange(n)
        return torch.linspace(0, n - 1, SAMPLED_ROWS).long()

    def shared(self, model: Lance, cache: KVCache) -> Pass:
        """What a layer is given; its keys and values are added to the cache."""
        cos, sin = model.language_model.rotation(self.position_ids)
        return Pass(self.gen, self.mask, cache, True, self.raise_qk, cos, sin)

    def taken(self, dtype: torch.dtype) -> "TorchPass":
        """The pass with the sampled rows alone, in a dtype."""
        rows = self.sample
        return replace(
            self, rows=self.rows[rows].to(dtype), gen=self.gen[rows], position_ids=self.position_ids[:, rows]
        )

    def others(self, seen: KVCache, index: int, dtype: torch.dtype) -> KVCache:
        """A cache with the keys and values of a layer that the sampled rows see beside their own, in a dtype."""
        keys, values = seen.layers[index]
        others = torch.ones(len(keys), dtype=torch.bool)
        others[len(keys) - len(self.rows) + self.sample] = False
        cache = KVCache()
        if others.any():
            cache.layers[index] = keys[others].to(dtype), values[others].to(dtype)
        return cache


Passes = dict[str, TorchPass]
"""The passes by their calls, in the order of a run: an arm's prefix before its last block."""


def sampled(taps: Mapping[str, Tap], each: TorchPass) -> Recording:
    """The sampled rows of the taps of a pass."""
    if len(each.sample) == len(each.rows):
        return dict(taps)
    chosen = np.zeros(len(each.rows), bool)
    chosen[each.sample.numpy()] = True
    gen = each.gen.numpy()
    cut: Recording = {}
    for name, tap in taps.items():
        path = parse(name).path
        whole = path.endswith(_ONCE) or path.rpartition(".")[2].isdigit() or not gen.any()
        rows = chosen if whole else chosen[gen] if "_moe_gen" in path else chosen[~gen]
        cut[name] = Tap(tap.array[rows], tap.dtype)
    return cut


def note_passes(run: TorchReplay, vit: np.ndarray | None, force: Mapping[str, Tap]) -> tuple[Recording, Passes]:
    """Embed a request and note the passes that it makes; no layer is run.

    `vit` are the vision tower's tokens, float32 [tokens, hidden].
    """
    language_model, dtype = run.pipeline.model.language_model, run.pipeline.numerics.torch_dtype
    passes: Passes = {}

    def note(
        inputs_embeds: Tensor,
        position_ids: Tensor,
        gen: Tensor,
        mask: Tensor | None,
        cache: KVCache,
        keep: bool,
        raise_qk: bool,
    ) -> None:
        passes[capture.call] = TorchPass(capture.call, inputs_embeds, position_ids, gen, mask, keep, raise_qk)
        if keep:
            # The next mask is as wide as what was kept.
            length = torch.empty(cache.length + len(inputs_embeds), 0)
            cache.layers[0] = length, length
        raise _Noted

    with patch.object(language_model, "forward", note), run.capture(_LATER, force=force) as capture:
        inputs = run.pipeline.inputs(run.layout, None if vit is None else torch.tensor(vit).to(dtype))
        if run.layout.answer is None:
            _start(run, inputs, capture)
        else:
            _read(run, inputs, capture)
    return capture.recording, passes


def _start(run: TorchReplay, inputs: Inputs, capture: TorchCapture) -> None:
    request = run.request
    noise = torch.tensor(run.replay.noise).to(run.pipeline.numerics.torch_dtype)
    capture.keep("sampler.noise", noise)
    x_init = capture.observe("sampler.x_init", start(noise, None, inputs.made))
    timestep = torch.zeros(len(x_init))
    timestep[inputs.made] = time_grid(request.num_steps, request.timestep_shift)[0]
    arms = [capture.follow(arm) for arm in build_arms(inputs, request, "kv_cache", x_init)[: 1 + run.guided[0]]]
    for arm in arms:
        for index in range(arm.prefixes):
            with suppress(_Noted):
                arm.prefill(index)
    for arm in arms:
        with suppress(_Noted):
            arm.velocity(0, x_init, timestep)


def _read(run: TorchReplay, inputs: Inputs, capture: TorchCapture) -> None:
    layout, limit = run.layout, run.request.max_new_tokens
    reader = capture.follow_reader(build_reader(inputs, run.pipeline.tokenizer, "kv_cache", limit)[0])
    for index in range(reader.prefixes):
        with suppress(_Noted):
            reader.prefill(index)
    with suppress(_Noted):
        reader.logits(0, int(layout.text_ids[layout.answer - 1]))


def finish_passes(run: TorchReplay, passes: Passes, force: Mapping[str, Tap]) -> Recording:
    """Norm what the last layer put out, and make the velocity or the logits of it."""
    model, dtype = run.pipeline.model, run.pipeline.numerics.torch_dtype
    language_model, velocities = model.language_model, dict[str, Tensor]()
    layers, language_model.model.layers = language_model.model.layers, nn.ModuleList()
    try:
        with run.capture(HEAD_TAPS, force=force) as capture:
            for call, each in passes.items():
                capture.enter(call)
                hidden = language_model(
                    inputs_embeds=each.rows.to(dtype),
                    position_ids=each.position_ids,
                    gen=each.gen,
                    mask=each.mask,
                    cache=KVCache(),
                    keep=False,
                    raise_qk=each.raise_qk,
                )
                if ".step" in call:
                    velocities[each.arm] = model.llm2vae(hidden)[each.gen]
                elif ".decode" in call:
                    language_model.lm_head(hidden)
            if len(velocities) == 2:
                capture.keep(GUIDED, guide(velocities["cond"], velocities["uncond"], run.request))
    finally:
        language_model.model.layers = layers
    return capture.recording
