"""The flow sampler: one arm a condition, a cached prefix each, and a generator of Euler steps."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ExpertRows, KVCache
from lance_mlx.model.rope import RotaryTable, rotary_table
from lance_mlx.numerics import scaled
from lance_mlx.positions import position_ids, unconditional_position_ids
from lance_mlx.request import Entry, Request
from lance_mlx.sampling.guidance import guided_velocity, is_guided
from lance_mlx.sampling.noise import check_noise
from lance_mlx.sampling.schedule import timesteps
from lance_mlx.sequence import AttentionMode, Role, Sequence


@dataclass(frozen=True, eq=False)
class State:
    """Where the sampler stands at the start of a step.

    Attributes:
        index: number of the step, from 0.
        t: time, 1 = noise and 0 = data.
        timestep: t of every latent token, float32 [n].
        x_t: latents, [n, 48] in the policy's dtype.
        inputs_embeds: what both arms are given: the block's brackets and its latents at their times, [rows, hidden].
    """

    index: int
    t: float
    timestep: np.ndarray
    x_t: mx.array
    inputs_embeds: ExpertRows


@dataclass(frozen=True, eq=False)
class Step:
    """One finished step; velocities point from data to noise, [n, 48] each.

    Attributes:
        velocity_uncond: None where guidance did not act.
        velocity: the velocity that was applied.
        x_next: latents after the step, [n, 48].
    """

    state: State
    velocity_cond: mx.array
    velocity_uncond: mx.array | None
    velocity: mx.array
    x_next: mx.array


class Arm:
    """One condition of the guidance: its sequence, its position ids and the cache of its prefix.

    The segments before the denoised block do not see it, so they are computed once; a step computes the block alone.
    The closing segment after the block influences nothing that is sampled and is never computed.
    """

    def __init__(self, name: str, model: Lance, sequence: Sequence, positions: np.ndarray, entry: Entry) -> None:
        """
        Args:
            name: "cond" or "uncond".
            positions: RoPE ids of the whole sequence, int32 [3, n].
        """
        self.name = name
        self.sequence = sequence
        self._model = model
        self._positions = positions
        # Upstream's cached entry norms and rotates queries and keys in float32 in every pass that holds latents.
        self._qk_float32 = entry is Entry.KV_CACHE
        self._cache: KVCache = ()
        self._block_rotary = self._rotary(sequence.target_index)

    def prefill(self, index: int) -> None:
        """Append the segment number `index` of the prefix to the cache; segments go in in order."""
        segment = self.sequence.prefix[index]
        _, self._cache = self._model.language_model.model(
            ExpertRows(self._model.language_model.model.embed_tokens(mx.array(segment.ids)), None),
            self._rotary(index),
            self._cache,
            causal=segment.mode is AttentionMode.CAUSAL,
            qk_float32=False,
        )
        mx.eval(self._cache)

    def velocity(self, state: State) -> mx.array:
        """Velocity of the latents in `state`, [n, 48]; the cache stays as it is."""
        hidden, _ = self._model.language_model.model(
            state.inputs_embeds,
            self._block_rotary,
            self._cache,
            causal=False,
            qk_float32=self._qk_float32,
        )
        return self._model.llm2vae(hidden.merged())[1:-1]

    def _rotary(self, index: int) -> RotaryTable:
        start = self.sequence.starts[index]
        positions = self._positions[:, start : start + len(self.sequence.segments[index])]
        return rotary_table(positions, self._model.config, self._model.numerics)


def make_arms(model: Lance, request: Request, sequence: Sequence) -> dict[str, Arm]:
    """The arms that the request needs, by name, with empty caches: always "cond", and "uncond" where a step is
    guided."""
    tokens_per_second = model.config.tokens_per_second
    arms = {"cond": Arm("cond", model, sequence, position_ids(sequence, tokens_per_second), request.entry)}
    if request.guidance_scale > 1.0:
        positions = unconditional_position_ids(sequence, tokens_per_second, request.entry)
        arms["uncond"] = Arm("uncond", model, sequence.without(Role.TEXT), positions, request.entry)
    return arms


def denoise(model: Lance, request: Request, sequence: Sequence, noise: mx.array) -> Iterator[Step]:
    """Yield every step from noise to latents; the caller shows progress and may stop at any time.

    Args:
        noise: [n, 48]; cast to the policy's dtype.

    Raises:
        LanceError: `noise` has another shape than the request's latents.
    """
    check_noise(request, noise)
    arms = make_arms(model, request, sequence)
    for arm in arms.values():
        for index in range(len(arm.sequence.prefix)):
            arm.prefill(index)
    block = sequence.target
    brackets = model.language_model.model.embed_tokens(mx.array(block.ids[[0, -1]]))
    positions = model.latent_pos_embed(block.grid)
    times = timesteps(request.num_steps, request.timestep_shift)
    x_t = noise.astype(model.numerics.dtype)
    for index, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        timestep = np.full(len(x_t), t, np.float32)
        embeds = ExpertRows(brackets, model.embed_latents(x_t, timestep, positions))
        state = State(index, float(t), timestep, x_t, embeds)
        cond = arms["cond"].velocity(state)
        guided = is_guided(t, request)
        uncond = arms["uncond"].velocity(state) if guided else None
        velocity = guided_velocity(cond, uncond, request) if guided else cond
        x_t = x_t - scaled(velocity, float(t - t_next))
        mx.eval(x_t)
        yield Step(state, cond, uncond, velocity, x_t)
