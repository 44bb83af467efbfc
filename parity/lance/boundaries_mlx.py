"""The functions of lance_mlx between the modules: recorded, and steered by what the oracle has in their place.

Integers that must be equal are recorded under their names in `inputs/`; what a function makes of latents under the
names of the sampler's taps. A function that raises where the oracle has a value is recorded as a failure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from lance_mlx.errors import LanceError
from lance_mlx.model.lance import Lance
from lance_mlx.requests.request import Request
from lance_mlx.sampling import flow
from lance_mlx.sampling.conditions import Conditions
from lance_mlx.sequence.segments import AttentionMode, Role, Segment
from lance_mlx.sequence.segments import Sequence as TokenSequence
from parity.lance.capture_mlx import MlxCapture
from parity.tensors.recording import ExactInputs, Recording, Split, Tap


@dataclass
class MlxBoundaries:
    """Context manager that watches the functions between the modules of lance_mlx, inside an MlxCapture.

    Attributes:
        exact: what is used in place of what is computed; None leaves everything as it is.
        computed: the exact arrays as lance_mlx computes them.
        failures: what a function raised, by the name of the exact array that it should have made.
        before: latents of the clean blocks, which the oracle's states hold before those of the denoised one.
        num_steps: denoising steps of the request; what the last one makes is the latent.
        whole_sequence: whether the run follows the full-sequence entry, whose velocities are taps.
    """

    capture: MlxCapture
    exact: ExactInputs | None = None
    computed: Recording = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    before: list[mx.array] = field(default_factory=list)
    num_steps: int = 0
    whole_sequence: bool = False
    _calls: int = 0
    _step: int = 0
    _guided: list[int] = field(default_factory=list)
    _answered: list[int] = field(default_factory=list)
    _arms: int = 0

    def __enter__(self) -> "MlxBoundaries":
        wrap = self.capture.wrap
        wrap("sequence to draw", self._sequence)
        wrap("sequence to answer", self._sequence)
        wrap("answer start", self._answer_start)
        wrap("positions to draw", self._exact("inputs/position_ids.cond"))
        wrap("unconditional positions", self._exact("inputs/position_ids.uncond"))
        wrap("positions to answer", self._exact("inputs/position_ids.cond"))
        wrap("unconditional sequence", self._unconditional)
        wrap("times", self._exact("inputs/timesteps"))
        wrap("is guided", self._is_guided)
        wrap("prefix to draw", self._embed_prefix("prefix"))
        wrap("prefix to answer", self._embed_prefix("prefill"))
        wrap("step", self._velocities)
        wrap("initial state", self._initial_state)
        wrap("guided velocity", self._guided_velocity)
        wrap("next state", self._advance)
        wrap("chosen token", self._choose)
        # What is begun in vain is not to be recorded.
        wrap("looks ahead", lambda original, reader: False)
        return self

    def __exit__(self, *exception: object) -> None:
        """The capture undoes what was wrapped."""

    def note(self, name: str, value: Any) -> None:
        """Record an exact array, if it is the first of its name."""
        array = np.asarray(value)
        kind = np.float32 if array.dtype.kind == "f" else np.int32
        self.computed.setdefault(name, Tap(np.array(array, kind), np.dtype(kind).name))

    def _attempt(self, name: str, original: Callable, *args: Any, **values: Any) -> Any:
        try:
            return original(*args, **values)
        except Exception as error:
            if self.exact is None:
                raise
            known = isinstance(error, LanceError)
            self.failures.setdefault(name, str(error) if known else f"{type(error).__name__}: {error}")
            return None

    def _exact(self, name: str) -> Callable:
        def exact(original: Callable, *args: Any, **values: Any) -> np.ndarray:
            computed = self._attempt(name, original, *args, **values)
            if computed is not None:
                self.note(name, computed)
            return self.exact.arrays[name].copy() if self._given(name) else computed

        return exact

    def _sequence(self, original: Callable, *args: Any, **values: Any) -> TokenSequence:
        computed = self._attempt("inputs/request", original, *args, **values)
        if computed is not None:
            self.note("inputs/text_ids", computed.ids)
            self.note("inputs/modality", computed.roles)
            self.note("inputs/split_lens", [len(segment) for segment in computed.segments])
            self.note("inputs/attn_modes", [segment.mode for segment in computed.segments])
            self.note("inputs/grids_thw", [segment.grid for segment in computed.segments if segment.grid is not None])
        return _sequence_of(self.exact.splits) if self._given("inputs/text_ids") else computed

    def _given(self, name: str) -> bool:
        """Whether the exact inputs, which may hold some arrays only, hold this one."""
        return self.exact is not None and name in self.exact.arrays

    def _answer_start(self, original: Callable, *args: Any, **values: Any) -> int:
        computed = self._attempt("inputs/answer", original, *args, **values)
        if computed is not None:
            self.note("inputs/answer", [computed])
        return self.exact.answer if self._given("inputs/answer") else computed

    def _unconditional(self, original: Callable, sequence: TokenSequence) -> TokenSequence:
        computed = self._attempt("inputs/text_ids.uncond", original, sequence)
        if computed is not None:
            self.note("inputs/text_ids.uncond", computed.ids)
        if not self._given("inputs/text_ids.uncond"):
            return computed
        return _sequence_of([split for split in self.exact.splits if split.role != Role.TEXT])

    def _is_guided(self, original: Callable, t: float, request: Request) -> bool:
        computed = bool(original(t, request))
        self._guided.append(int(computed))
        self.computed["inputs/guided"] = Tap(np.array(self._guided, np.int32), "int32")
        if not self._given("inputs/guided"):
            return computed
        return bool(self.exact.arrays["inputs/guided"][len(self._guided) - 1])

    def _embed_prefix(self, kind: str) -> Callable:
        def embed(original: Callable, model: Lance, segments: Sequence[Segment], conditions: Conditions) -> list:
            arm = ("cond", "uncond")[min(self._arms, 1)]
            self._arms += 1
            with self.capture.embedding([f"{arm}.{kind}{index}" for index in range(len(segments))]):
                embedded = original(model, segments, conditions)
            if kind == "prefix":
                self.capture.enter("cond.step0")
            return embedded

        return embed

    def whole(self, x: mx.array) -> mx.array:
        """A state of the denoised block behind the latents of the clean ones, [latents, 48]."""
        return mx.concatenate([*self.before, x]) if self.before else x

    def _state(self, name: str, x: mx.array) -> mx.array:
        whole = self.whole(x)
        used = self.capture.observe(name, whole)
        return x if used is whole else used[len(used) - len(x) :]

    def _velocities(
        self, original: Callable, model: Lance, arms: Sequence[flow.Arm], state: flow.State
    ) -> list[mx.array]:
        outputs = original(model, arms, state)
        return [self._velocity(output, state) for output in outputs] if self.whole_sequence else outputs

    def _velocity(self, output: mx.array, state: flow.State) -> mx.array:
        given = int((state.timestep == 0).sum())
        moving = self.capture.observe(f"velocity_call{self._calls}", output[given:])
        self._calls += 1
        return mx.concatenate([output[:given], moving]) if given else moving

    def _initial_state(self, original: Callable, noise: mx.array, clean: mx.array | None) -> mx.array:
        return self._state("sampler.x_init", original(noise, clean))

    def _guided_velocity(self, original: Callable, cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
        return self.capture.observe(f"sampler.velocity{self._step}", original(cond, uncond, request))

    def _advance(self, original: Callable, x_t: mx.array, velocity: mx.array, interval: float) -> mx.array:
        x_next = original(x_t, velocity, interval)
        self._step += 1
        if self._step < self.num_steps:
            x_next = self._state(f"sampler.x_t{self._step}", x_next)
            self.capture.enter(f"cond.step{self._step}")
        return x_next

    def _choose(self, original: Callable, *args: Any, **values: Any) -> mx.array:
        computed = original(*args, **values)
        tokens = self.capture.force.get("tokens")
        place = len(self._answered)
        if tokens is None or place >= len(tokens.array):
            return computed
        self._answered.append(computed.item())
        self.computed["tokens"] = Tap(np.array(self._answered, np.int32), "int32")
        return mx.array(tokens.array[place])


def _sequence_of(splits: Sequence[Split]) -> TokenSequence:
    return TokenSequence(
        tuple(
            Segment(Role(split.role), AttentionMode(split.mode), split.ids, split.grid, split.clean_frames)
            for split in splits
        )
    )
