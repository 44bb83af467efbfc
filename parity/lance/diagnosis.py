"""Names the component behind a divergence that no single tap of the oracle stands for."""

from collections.abc import Mapping

import numpy as np

from parity.bundle.reading import Bundle
from parity.lance.given import POSITION_LAYOUTS
from parity.lance.replay_torch import layout_reference
from parity.tensors.recording import Recording, Tap
from reference.errors import ReferenceError

FRACTION_BITS = {"float32": 23, "bfloat16": 7}
# Rounding moves a whole state by its expected error within a few percent, float32's t by a little more.
ROUNDING_SLACK = 2.0


def name_component(bundle: Bundle, recording: Recording, name: str, diverging: set[str]) -> str:
    """Return the component of the first diverging tap `name`; `diverging` holds the names of all of them.

    The oracle has no tap between the arms' velocities and the next state, so a state is traced to the schedule, to
    guidance or to the Euler step. In the full-sequence entry a wrong velocity is all there is: positions are told from
    the rest by laying the sequence out again, and guidance in other steps by the number of velocities.
    """
    tap = bundle.locate(name)
    if tap.component == "euler":
        step = tap.numbers.get("step", len(bundle.timesteps))
        return _after_step(bundle, recording, step - 1, diverging) if step else "noise"
    if "number" in tap.numbers:
        if _velocity_calls(recording) != _velocity_calls(bundle.expected):
            return "guidance"
        if _positions_differ(bundle, recording):
            return "positions"
    return tap.component


def _positions_differ(bundle: Bundle, recording: Recording) -> bool:
    # The oracles of the full-sequence entry hold no positions; the reference, which shares no code, stands in for them.
    try:
        expected = layout_reference(bundle.request, bundle.checkpoint / bundle.variant, bundle.path.parent)
    except ReferenceError:
        return False
    known = [name for name in POSITION_LAYOUTS if name in recording and name in expected]
    return any(not np.array_equal(recording[name].array, expected[name]) for name in known)


def _velocity_calls(taps: Mapping[str, object]) -> int:
    return sum(name.startswith("velocity_call") for name in taps)


def _after_step(bundle: Bundle, recording: Recording, step: int, diverging: set[str]) -> str:
    if f"sampler.timestep{step + 1}" in diverging:
        return "schedule"
    velocity = recording.get(f"sampler.velocity{step}")
    before, after = _state(bundle, recording, step), _state(bundle, recording, step + 1)
    if velocity is None or before is None or after is None or before.array.shape != velocity.array.shape:
        return "sampler"
    if after.dtype != bundle.dtype:
        return "euler" if velocity.dtype == bundle.dtype else "guidance"
    times = [*bundle.timesteps, 0.0]
    move = velocity.array.astype(np.float64) * (times[step] - times[step + 1])
    off = np.linalg.norm(before.array - move - after.array)
    # Both the product and the difference are rounded; a rounding error is spread evenly over one spacing.
    rounding = np.linalg.norm([_spacing(move, after.dtype), _spacing(after.array, after.dtype)]) / np.sqrt(12)
    # A state that follows from its own velocity was moved rightly, so the velocity is what differs.
    return "euler" if off > ROUNDING_SLACK * rounding else "guidance"


def _spacing(values: np.ndarray, dtype: str) -> np.ndarray:
    exponents = np.floor(np.log2(np.maximum(np.abs(values), np.finfo(np.float32).tiny)))
    return np.exp2(exponents - FRACTION_BITS[dtype])


def _state(bundle: Bundle, taps: Recording, step: int) -> Tap | None:
    if step < len(bundle.timesteps):
        return taps.get(f"sampler.x_t{step}")
    latent = taps.get("latent")
    return latent and Tap(latent.array.reshape(-1, latent.array.shape[-1]), latent.dtype)
