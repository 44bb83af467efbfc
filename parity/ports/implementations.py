"""The implementations that can be compared, behind one interface."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError, interrupted
from parity.lance.names import logits_name
from parity.tensors.recording import Recording, Replay

Progress = Callable[[str], None]

# What a layout calls the positions of the two arms of the full-sequence entry, whose oracles hold no position_ids.
POSITION_LAYOUTS = ("position_ids.cond", "position_ids.uncond")


class Implementation(Protocol):
    """Something that can replay a bundle and lay out a request."""

    name: str

    def record(self, bundle: Bundle, progress: Progress | None = None) -> Recording:
        """Replay a bundle's request from its noise under its numerics policy, and return everything it computes.

        An answer is given the bundle's tokens one by one. Beside the oracle's taps a recording holds the integers of
        the sequence under their names in inputs.safetensors, and may hold `sampler.velocity{k}`, the velocity after
        guidance, and the logits of an answer. Raises ParityError when it cannot run.
        """

    def preprocessed(self, bundle: Bundle) -> dict[str, np.ndarray] | None:
        """The visuals as it resizes them itself, by the names of the bundle's inputs; None where it has no part."""

    def layout(self, request: dict, tokenizer: Path, media: Path) -> dict[str, np.ndarray]:
        """Lay out a request with the tokenizer in a folder: the arrays of a layout's .npz, under the same names.

        `media` is the folder that the paths of images and videos start from.
        """

    def versions(self) -> dict[str, str]:
        """Return the names and versions of what computes."""


class Reference:
    """The PyTorch reference, through parity/lance/replay_torch.py."""

    name = "reference"

    def record(self, bundle: Bundle, progress: Progress | None = None) -> Recording:
        """Replay with one rounding a product; see Implementation.record."""
        return self.record_with(bundle, bundle.dtype, progress=progress)

    def record_with(
        self,
        bundle: Bundle,
        dtype: str,
        attention: str = "sdpa",
        linear: str = "float32",
        progress: Progress | None = None,
    ) -> Recording:
        """Replay in any dtype and order of rounding; see reference.numerics.Numerics."""
        with one_line(f"reference cannot run bundle {bundle.name}"):
            from parity.lance.replay_torch import record_reference
            from reference.numerics import Numerics

            return record_reference(
                bundle.checkpoint,
                bundle.variant,
                bundle.request,
                bundle.entry,
                replay_of(bundle),
                Numerics(dtype, attention, linear),
                wanted(bundle),
                progress,
                force=answered(bundle),
            )

    def layout(self, request: dict, tokenizer: Path, media: Path) -> dict[str, np.ndarray]:
        """See Implementation.layout."""
        with one_line("reference cannot lay out the request"):
            from parity.lance.replay_torch import layout_reference

            return layout_reference(request, tokenizer, media)

    def preprocessed(self, bundle: Bundle) -> dict[str, np.ndarray] | None:
        """See Implementation.preprocessed."""
        with one_line(f"reference cannot prepare the visuals of bundle {bundle.name}"):
            from parity.lance.replay_torch import preprocess_reference
            from reference.request import Request

            return preprocess_reference(Request.from_dict(bundle.request), bundle.path.parent)

    def versions(self) -> dict[str, str]:
        """See Implementation.versions."""
        return versions("torch")


class Mlx:
    """The MLX port, through parity/lance/capture_mlx.py and parity/lance/replay_mlx.py."""

    name = "mlx"

    def record(self, bundle: Bundle, progress: Progress | None = None) -> Recording:
        """See Implementation.record."""
        with one_line(f"mlx cannot run bundle {bundle.name}"):
            from parity.lance.replay_mlx import record_mlx

            return record_mlx(
                bundle.checkpoint,
                bundle.variant,
                bundle.request,
                bundle.entry,
                replay_of(bundle),
                bundle.dtype,
                wanted(bundle),
                progress,
                force=answered(bundle),
            )

    def layout(self, request: dict, tokenizer: Path, media: Path) -> dict[str, np.ndarray]:
        """See Implementation.layout."""
        with one_line("mlx cannot lay out the request"):
            from parity.lance.replay_mlx import layout_mlx

            return layout_mlx(request, tokenizer, media)

    def preprocessed(self, bundle: Bundle) -> dict[str, np.ndarray] | None:
        """See Implementation.preprocessed."""
        with one_line(f"mlx cannot prepare the visuals of bundle {bundle.name}"):
            from parity.lance.replay_mlx import preprocess_mlx

            return preprocess_mlx(bundle.request, bundle.entry, bundle.path.parent)

    def versions(self) -> dict[str, str]:
        """See Implementation.versions."""
        return versions("mlx")


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {"mlx": Mlx, "reference": Reference}


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever an implementation raises into a ParityError of one line; the cause stays attached."""
    try:
        yield
    except Exception as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        # The implementations' own errors are a sentence already; of any other the kind says as much as the text.
        known = type(error).__module__.partition(".")[0] in ("lance_mlx", "reference", "parity")
        text = " ".join(str(error).split())
        raise ParityError(f"{what}: {text if known else f'{type(error).__name__}: {text}'}") from error


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


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, NumPy and the named packages."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    return found | {package: importlib.metadata.version(package) for package in packages}
