"""Pictures as they are given to a model, beside those that were."""

from collections.abc import Container, Iterator, Mapping

import numpy as np

from parity.tensors.recording import Recording


def differing_visuals(
    computed: Mapping[str, np.ndarray], inputs: Recording, drawn: Container[str] = ()
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The visuals that somebody resizes otherwise than upstream's run was given them: their names, and both arrays.

    Of those named in `drawn` upstream draws where they are cut, which is one pixel's matter, so that a picture that is
    the same but for one pixel's shift is as good.
    """
    grids = inputs["vit_video_grid_thw"].array.tolist() if "vit_video_grid_thw" in inputs else []
    for name, got in computed.items():
        if name not in inputs:
            continue
        expected = inputs[name].array
        if name.startswith("vae_pixels") and got.shape[1] == 1:
            # A picture that begins a video: what follows it in the oracle's input is a placeholder.
            expected = expected[:, :1]
        frames = (expected, got)
        if name.startswith("vit_patches") and expected.shape == got.shape:
            grid = grids[int(name.removeprefix("vit_patches"))]
            frames = _pixels(expected, grid), _pixels(got, grid)
        if not (np.array_equal(*frames) or (name in drawn and _shifted(*frames))):
            yield name, expected, got


def _shifted(expected: np.ndarray, got: np.ndarray) -> bool:
    """Whether a picture is another shifted by a pixel in either direction or both, with any colours behind it."""
    if expected.shape != got.shape or not np.isfinite(got).all():
        return False
    least, most = expected.min(), expected.max()
    if got.min() < 2 * least - most or got.max() > 2 * most - least:
        return False
    cuts = (slice(None), slice(None)), (slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))
    return any(
        np.array_equal(expected[..., rows[0], columns[0]], got[..., rows[1], columns[1]])
        for rows in cuts
        for columns in cuts
    )


def _pixels(patches: np.ndarray, grid: list[int]) -> np.ndarray:
    """Patches [n, 1176] of a grid (t, h, w) as frames [2t, 3, 14h, 14w]: undoes the order of merged tokens."""
    t, h, w = grid
    blocks = patches.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    return blocks.transpose(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(2 * t, 3, 14 * h, 14 * w)
