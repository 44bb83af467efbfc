"""How much one client may ask of the machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Upper bounds; what is over one is refused with a line that names it.

    Attributes:
        upload_bytes: of one image or video file.
        image_pixels, frame_pixels: of an image; of a frame of a video, of which up to 73 are in memory at once.
        frames: of a video, as stored.
        visuals: images or videos of one request.
        waiting: requests in the queue.
        kept: finished videos that wait to be fetched; the oldest goes first.
        prompt: characters of a prompt, a question or an instruction.
        steps: denoising steps.
        tokens: of an answer.
        images: made by one request.
        page_bytes: files that the page keeps.
    """

    upload_bytes: int = 64 << 20
    image_pixels: int = 50_000_000
    frame_pixels: int = 1920 * 1088
    frames: int = 3600
    visuals: int = 8
    waiting: int = 16
    kept: int = 32
    prompt: int = 32_000
    steps: int = 200
    tokens: int = 4096
    images: int = 4
    page_bytes: int = 2 << 30

    @property
    def body_bytes(self) -> int:
        """Of one request: a file in base64, and text."""
        return self.upload_bytes * 4 // 3 + (1 << 20)


BOUNDS = Bounds()
