"""What comes back: an image or a video, or an answer."""

import base64
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lance_mlx.checkpoint.streaming import AnyVAE
from lance_mlx.config import SPATIAL_STRIDE
from lance_mlx.media.write import check_output, save_image, save_video, to_uint8
from lance_mlx.model.vae import num_decoded_frames
from lance_mlx.requests.request import Question, Request, Scheduler


@dataclass(frozen=True, eq=False)
class Generated:
    """An image or a video: its latents, which become pixels when they are asked for.

    Attributes:
        request: the request, with the size that its source dictates.
        latents: [t, h, w, 48] in the policy's dtype, normalised.
        numerics: name of the policy.
        seconds_a_step: mean time of a denoising step; of a batch, its share.
        earlier: the requests of the turns before this one, the first one first.
        vae: what decodes the latents.
        made_by: the model, variant, numerics, quantizing and adapters that were used, as plain JSON values.
        stopped_after: steps that were done where the callback stopped it, None where all were.
    """

    request: Request
    latents: mx.array
    numerics: str
    seconds_a_step: float
    earlier: tuple[Request, ...]
    vae: AnyVAE
    made_by: Mapping[str, Any]
    stopped_after: int | None = None

    def __repr__(self) -> str:
        size = f"{self.num_frames}x{self.request.height}x{self.request.width}"
        return f"Generated({self.request.task}, {size}, seed {self.request.seed}, {self.numerics})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: the image, or a player with the video; `include` and `exclude` are IPython's."""
        still = len(self.frames) == 1  # decoded here, so that they are not decoded again
        with tempfile.TemporaryDirectory() as folder:
            self.save(path := Path(folder, "shown.png" if still else "shown.mp4"))
            data = base64.b64encode(path.read_bytes()).decode()
        player = f'<video controls loop src="data:video/mp4;base64,{data}"></video>'
        return {"text/plain": repr(self)} | ({"image/png": data} if still else {"text/html": player})

    @property
    def num_frames(self) -> int:
        """Frames that the latents decode to: 4k + 1, which may be fewer than were asked for."""
        return num_decoded_frames(len(self.latents))

    @cached_property
    def frames(self) -> np.ndarray:
        """All frames, uint8 [T, H, W, 3], decoded once; raises LanceError for pixels that are not finite."""
        return np.stack(list(self.decode()))

    def decode(self) -> Iterator[np.ndarray]:
        """Yield the frames one by one, uint8 [H, W, 3], holding few at a time; raises LanceError as `frames` does."""
        if "frames" in vars(self):
            yield from self.frames
            return
        for chunk in self.vae.decode(self.latents):
            yield from to_uint8(np.array(chunk))

    @property
    def metadata(self) -> dict[str, Any]:
        """What made this, as plain JSON values; `save` writes it into the file."""
        values = {"generator": f"lance-mlx {version('lance-mlx')}", "request": self.request.to_dict()}
        tile = (self.vae.tile_for(self.latents.shape[:3], False) or 0) * SPATIAL_STRIDE
        first = (*self.earlier, self.request)[0]
        more = {
            **self.made_by,
            "sources": [visual.digest() for visual in first.visuals],
            "earlier": [request.to_dict() for request in self.earlier],
            "departures": departures(self.request) + ([f"frames decoded in tiles of {tile} pixels"] if tile else []),
            "vae_tiling": tile,
            "stopped_after": self.stopped_after,
        }
        return values | {name: value for name, value in more.items() if value}

    def save(
        self,
        path: str | os.PathLike[str],
        notes: Mapping[str, Any] | None = None,
        track: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]] = iter,
    ) -> None:
        """Write one frame as .png, .jpg or .webp, several as .mp4, .mov or .gif; the file appears when it is whole.

        Args:
            notes: plain JSON values to write beside the metadata.
            track: wraps the frames while they are written, as tqdm does, to show progress.

        Raises:
            LanceError: the suffix does not fit, or the file cannot be written.
        """
        path = check_output(path, self.num_frames)
        metadata = self.metadata | dict(notes or {})
        if self.num_frames == 1:
            (frame,) = track(self.decode())
            save_image(path, frame, metadata)
        else:
            save_video(path, track(self.decode()), self.request.fps, metadata)


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        text: without control tokens.
        tokens: what the model answered, `<|im_end|>` included where it ended the answer itself.
        raw_text: the tokens' text with control tokens written out, as upstream's prompt.json has it.
        seconds_reading: time of looking at the visuals and reading the prompt.
        seconds_a_token: mean time of a token.
    """

    question: Question
    text: str
    tokens: tuple[int, ...]
    raw_text: str
    seconds_reading: float
    seconds_a_token: float

    def __repr__(self) -> str:
        return f"Answer({self.text[:60]!r}, {len(self.tokens)} tokens)"


def departures(request: Request) -> list[str]:
    """What a request asks for that upstream has not, in words."""
    told = {
        "a negative prompt in place of the sequence without text": request.negative_prompt is not None,
        f"an edit of strength {request.strength}, from its source's latents": request.strength < 1,
        f"{request.scheduler} in place of Euler steps": request.scheduler is not Scheduler.EULER,
    }
    return [words for words, holds in told.items() if holds]
