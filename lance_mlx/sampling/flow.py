"""The flow sampler: one arm a condition, a cached prefix each, and a generator of steps.

The pictures of a batch are sampled side by side: their latents follow each other, p pictures of n latents each, and
all arms of all pictures are readings of one pass.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import runs_on_cpu, scaled
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ArmInput, ExpertRows
from lance_mlx.model.rope import RotaryTable
from lance_mlx.requests.request import Entry, Request
from lance_mlx.sampling.conditions import Conditions, GuidanceArm, embed_prefix
from lance_mlx.sampling.guidance import guided_velocity, is_guided
from lance_mlx.sampling.noise import check_noise, over_source
from lance_mlx.sampling.schedule import timesteps
from lance_mlx.sampling.solvers import make_solver
from lance_mlx.sequence.positions import position_ids, unconditional_position_ids
from lance_mlx.sequence.segments import Role, Sequence

_JOINED_ON_CPU, _JOINED_ON_GPU = 1024, 4096
"""Latents up to which both arms go through the layers in one pass: beyond, products are as fast for one of them, and
what exists at once would grow. Measured at hidden 512 and 2048 on a CPU, at 2048 on an H200."""

Tell = Callable[[int, int], None]
"""Called with how much of something is done, and how much of it there is."""


@dataclass(frozen=True, eq=False)
class State:
    """Where the sampler stands at the start of a step.

    Of a batch, what the pictures have follows each other, until `split_pictures` parts it.

    Attributes:
        index: number of the step, from 0.
        t: time, 1 = noise and 0 = data.
        timestep: t of every latent of the denoised block, float32 [n]; 0 for given ones.
        x_t: latents of the denoised block, [n, 48] in the policy's dtype.
        inputs_embeds: what both arms are given: the block's brackets and its latents at their times, [rows, hidden].
    """

    index: int
    t: float
    timestep: np.ndarray
    x_t: mx.array
    inputs_embeds: ExpertRows

    def __repr__(self) -> str:
        return f"State({self.index}, t={self.t:.3f}, {len(self.x_t)} latents)"

    @property
    def pictures(self) -> int:
        """How many pictures it is of: each has two brackets."""
        return len(self.inputs_embeds.und) // 2

    def split_pictures(self) -> list["State"]:
        """The state of every picture by itself."""
        parts = (np.split(self.timestep, self.pictures), mx.split(self.x_t, self.pictures))
        embeds = self.inputs_embeds.split_arms(self.pictures)
        return [State(self.index, self.t, *own) for own in zip(*parts, embeds, strict=True)]


@dataclass(frozen=True, eq=False)
class Step:
    """One finished step; velocities point from data to noise.

    The KV-cache entry has velocities for the whole block, [n, 48], the full-sequence entry for the latents that move.

    Attributes:
        velocity_uncond: None where guidance did not act.
        velocity: the velocity after guidance, all three where the step starts.
        x_next: latents of the block after the step, [n, 48].
    """

    state: State
    velocity_cond: mx.array
    velocity_uncond: mx.array | None
    velocity: mx.array
    x_next: mx.array

    def __repr__(self) -> str:
        return f"Step({self.state.index}, t={self.state.t:.3f}, {len(self.x_next)} latents)"

    def split_pictures(self) -> list["Step"]:
        """The step of every picture by itself."""
        if self.state.pictures == 1:
            return [self]
        count = self.state.pictures
        velocities = (self.velocity_cond, self.velocity_uncond, self.velocity, self.x_next)
        parts = [[None] * count if array is None else mx.split(array, count) for array in velocities]
        return [Step(*own) for own in zip(self.state.split_pictures(), *parts, strict=True)]


class Picture(NamedTuple):
    """What a picture of a batch is sampled from.

    Attributes:
        noise: [n, 48] for the denoised block; cast to the policy's dtype.
        negative: what guidance steers away from, as for `make_arms`.
    """

    request: Request
    sequence: Sequence
    noise: mx.array
    conditions: Conditions
    negative: Sequence | None = None


class Arm(GuidanceArm):
    """One condition of the guidance; a step computes the denoised block alone.

    The closing segment after the block influences nothing that is sampled and is never computed.
    """

    @property
    def block(self) -> ArmInput:
        """The denoised block as this arm reads it."""
        return self.reading(self._block_rotary)

    @cached_property
    def _block_rotary(self) -> RotaryTable:
        start = self.sequence.starts[self.sequence.target_index]
        return self.rotary(start, start + len(self.sequence.target))


def most_in_one_pass(on_cpu: bool) -> int:
    """Latents of a block, or of the blocks of a batch, up to which their arms are read in one pass."""
    return _JOINED_ON_CPU if on_cpu else _JOINED_ON_GPU


def goes_in_one_pass(latents: int, on_cpu: bool) -> bool:
    """Whether the arms of a block of so many latents are read in one pass."""
    return latents <= most_in_one_pass(on_cpu)


def velocities(model: Lance, arms: Items[Arm], state: State) -> list[mx.array]:
    """Velocity of all latents of the block for each arm, [n, 48] each.

    Args:
        arms: of a batch, those of the first picture come first.
    """
    if state.pictures > 1 or goes_in_one_pass(len(state.x_t), runs_on_cpu()):
        return velocities_of_pass(model, arms, state)
    return [velocity for arm in arms for velocity in velocities_of_pass(model, [arm], state)]


def velocities_of_pass(model: Lance, arms: Items[Arm], state: State) -> list[mx.array]:
    """Velocity of all latents of the block for each arm, [n, 48] each, from one pass in which the arms are readings;
    their caches stay as they are."""
    embeds = state.inputs_embeds.split_arms(state.pictures)
    rows = ExpertRows.concat_arms([own for own in embeds for _ in range(len(arms) // len(embeds))])
    readings = [arm.block for arm in arms]
    hidden, _ = model.language_model.model(rows, readings, causal=False, qk_float32=arms[0].qk_float32, keep=False)
    merged = mx.concatenate([part.interleave() for part in hidden.split_arms(len(arms))])
    return [velocity[1:-1] for velocity in mx.split(model.llm2vae(merged), len(arms))]


def make_arms(
    model: Lance, request: Request, sequence: Sequence, conditions: Conditions, negative: Sequence | None = None
) -> dict[str, Arm]:
    """The arms that the request needs, by name, with empty caches: always "cond", and "uncond" where a step is guided.

    Args:
        negative: what guidance steers away from, in place of the sequence without the user's text.
    """
    # Upstream's cached entry norms and rotates queries and keys in float32 in every pass that holds latents.
    qk_float32 = request.entry is Entry.KV_CACHE
    prefix = embed_prefix(model, sequence.prefix, conditions)
    tokens_per_second = model.config.tokens_per_second
    arms = {"cond": Arm("cond", model, sequence, position_ids(sequence, tokens_per_second), prefix, qk_float32)}
    if request.guidance_scale > 1.0:
        if negative is None:
            positions = unconditional_position_ids(sequence, tokens_per_second, request.entry)
            kept = unconditional(sequence)
        else:
            positions, kept = position_ids(negative, tokens_per_second), negative
        arms["uncond"] = Arm("uncond", model, kept, positions, embed_prefix(model, kept.prefix, conditions), qk_float32)
    return arms


def _read_prefixes(arms: Items[Arm], tell: Tell) -> None:
    segments = [(arm, index) for arm in arms for index in range(len(arm.prefix))]
    tell(0, len(segments))
    for done, (arm, index) in enumerate(segments, start=1):
        arm.prefill(index)
        tell(done, len(segments))


def unconditional(sequence: Sequence) -> Sequence:
    """The sequence that guidance steers away from: without the user's text, everything else kept."""
    return sequence.without(Role.TEXT)


def initial_state(noise: mx.array, clean: mx.array | None) -> mx.array:
    """Latents before the first step, [n, 48]: noise, behind the given latents where there are some.

    Args:
        noise: [n, 48] for the whole block, in the policy's dtype.
        clean: the block's given latents, [m, 48], or None.
    """
    return noise if clean is None else mx.concatenate([clean, noise[len(clean) :]])


def advance(x_t: mx.array, velocity: mx.array, interval: float) -> mx.array:
    """Latents after an Euler step, [n, 48] in the dtype of `x_t`.

    Args:
        velocity: [m, 48], from data to noise, of the last m latents; those before them are given and stay.
        interval: by how much t falls.
    """
    given = len(x_t) - len(velocity)
    moved = x_t[given:] - scaled(velocity, interval)
    return mx.concatenate([x_t[:given], moved]) if given else moved


Velocities = Callable[[Lance, Items[Arm], State], list[mx.array]]
"""What computes those of a step, as `velocities` does."""


def denoise(
    model: Lance,
    pictures: Items[Picture],
    tell: Tell = lambda done, total: None,
    split: Velocities | None = None,
) -> Iterator[list[Step]]:
    """Read what comes before the denoised block, then yield every step from noise to latents, of all pictures side by
    side.

    Pictures of one sequence, such as several seeds of a prompt, share what is read of it. The caller shows progress and
    may stop at any time.

    Args:
        pictures: their requests go together, as `lance_mlx.sampling.batch` has it.
        tell: called with the segments that are read.
        split: computes velocities in place of `velocities`, such as together with other processes.

    Raises:
        LanceError: a noise has another shape than its request's latents.
    """
    request, sequence = pictures[0].request, pictures[0].sequence
    made: dict[tuple[Sequence, Conditions], dict[str, Arm]] = {}
    arms = []
    for picture in pictures:
        check_noise(picture.request, picture.noise)
        read = picture.sequence, picture.conditions
        if read not in made:
            made[read] = make_arms(model, picture.request, *read, picture.negative)
        arms.append(made[read])
    _read_prefixes([arm for own in made.values() for arm in own.values()], tell)
    given = pictures[0].conditions.clean[-1] if sequence.target.clean_tokens else None
    noise = [picture.noise.astype(model.numerics.dtype) for picture in pictures]
    if request.first_step:
        t = float(timesteps(request.num_steps, request.timestep_shift)[request.first_step])
        noise = [over_source(each.conditions.clean[-1], own, t) for each, own in zip(pictures, noise, strict=True)]
    noise = [initial_state(own, given) for own in noise]
    return (step.split_pictures() for step in _steps(model, request, sequence, arms, mx.concatenate(noise), split))


def _steps(
    model: Lance,
    request: Request,
    sequence: Sequence,
    arms: Items[dict[str, Arm]],
    x_t: mx.array,
    split: Velocities | None,
) -> Iterator[Step]:
    block, count = sequence.target, len(arms)
    # With given latents there is one picture.
    given = block.clean_tokens
    brackets = model.language_model.model.embed_tokens(mx.array(np.tile(block.ids[[0, -1]], count)))
    positions = mx.concatenate([model.latent_pos_embed(block.grid)] * count)
    times = timesteps(request.num_steps, request.timestep_shift)
    # Which rows guidance is applied to, and so normed over, is where the two entries differ once more.
    rows = slice(given, None) if request.entry is Entry.FULL_SEQUENCE else slice(None)

    def seen(index: int, x_t: mx.array, t: float, guided: bool) -> tuple[State, mx.array, mx.array | None, mx.array]:
        """State, velocity of each arm, and velocity after guidance."""
        timestep = np.full(len(x_t), t, np.float32)
        timestep[:given] = 0
        embeds = ExpertRows(brackets, model.embed_latents(x_t, timestep, positions))
        state = State(index, float(t), timestep, x_t, embeds)
        names = ("cond", "uncond") if guided else ("cond",)
        found = (split or velocities)(model, [own[name] for own in arms for name in names], state)
        found = [velocity[rows] for velocity in found]
        cond = mx.concatenate(found[:: len(names)])
        if not guided:
            return state, cond, None, cond
        # Each picture is normed by itself.
        pairs = zip(found[::2], found[1::2], strict=True)
        velocity = mx.concatenate([guided_velocity(*pair, request) for pair in pairs])
        return state, cond, mx.concatenate(found[1::2]), velocity

    def moving(velocity: mx.array) -> mx.array:
        # In the full-sequence entry the velocity has no rows but these.
        return velocity[given - len(x_t) :]

    def field(x_t: mx.array, t: float) -> mx.array:
        return moving(seen(-1, x_t, t, is_guided(t, request))[3])

    solve = make_solver(request.scheduler, field, advance)
    guided = [is_guided(t, request) for t in times[:-1]]
    for index in range(request.first_step, request.num_steps):
        t, t_next = times[index : index + 2]
        if not any(guided[index:]):
            # Guidance is over: nothing looks into that cache any more.
            for own in arms:
                own.pop("uncond", None)
        state, cond, uncond, velocity = seen(index, x_t, t, guided[index])
        along = solve(moving(velocity), x_t, float(t), float(t_next))
        x_t = advance(x_t, along, float(t - t_next))
        mx.eval(x_t)
        yield Step(state, cond, uncond, velocity, x_t)
