"""What a bundle gives to a run of it, and what of that run is recorded."""

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError
from parity.lance.names import logits_name
from parity.tensors.recording import Recording, Replay

# What a layout calls the positions of the two arms of the full-sequence entry, whose oracles hold no position_ids.
POSITION_LAYOUTS = ("position_ids.cond", "position_ids.uncond")


def replay_of(bundle: Bundle) -> Replay:
    """Return what a run must be given to be comparable; raises ParityError where the bundle lacks some of it."""
    pixels, patches = (_numbered(bundle.inputs, f"{kind}{{}}") for kind in ("vae_pixels", "vit_patches"))
    eps = _numbered(bundle.taps, "vae.encode{}.eps")
    noise = bundle.taps.get("sampler.noise")
    if noise is None and not bundle.task.startswith("x2t"):
        raise ParityError(f"bundle {bundle.name} has no sampler.noise: without it nothing can be replayed")
    if len(eps) < len(pixels):
        raise ParityError(f"bundle {bundle.name} lacks vae.encode{len(eps)}.eps: without it nothing can be replayed")
    grids = bundle.inputs.get("vit_video_grid_thw")
    shapes = [] if grids is None else [tuple(int(size) for size in grid) for grid in grids.array]
    if [len(p) for p in patches] != [t * h * w for t, h, w in shapes]:
        raise ParityError(f"bundle {bundle.name}: vit_patches do not fill vit_video_grid_thw: capture it again")
    return Replay(noise and noise.array, pixels, patches, tuple(shapes), eps)


def _numbered(taps: Recording, pattern: str) -> tuple[np.ndarray, ...]:
    arrays = []
    while (name := pattern.format(len(arrays))) in taps:
        arrays.append(taps[name].array)
    return tuple(arrays)


def answered(bundle: Bundle) -> Recording:
    """The tokens that a run of a question is given, whatever it would answer itself."""
    return {name: tap for name, tap in bundle.taps.items() if name == "tokens"}


def wanted(bundle: Bundle) -> set[str]:
    """Return the names to record: the oracle's, its integer inputs, and what naming a component needs beside them."""
    steps = range(len(bundle.timesteps))
    names = {*bundle.expected, *bundle.inputs, *(f"sampler.velocity{step}" for step in steps)}
    if "tokens" in bundle.taps:
        names |= {logits_name(step) for step in range(bundle.taps["tokens"].size)}
    if bundle.entry == "full_sequence":
        names |= {f"velocity_call{call}" for call in range(2 * len(steps))} | set(POSITION_LAYOUTS)
    return names
