"""Prompt rewriting: a short prompt made detailed by a chat model behind an OpenAI-compatible endpoint.

Off unless asked for, and for videos only, as upstream has it (bytedance/Lance common/utils/caption_rewrite.py).
"""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from PIL import Image

from lance_mlx.errors import LanceError
from lance_mlx.media.read import read_visual
from lance_mlx.requests.request import Task

REWRITABLE = (Task.T2V, Task.I2V)
_DEFAULT_BASE_URL = "https://api.openai.com/v1"
_VARIABLES = {
    "api_key": "LANCE_REWRITE_API_KEY",
    "model": "LANCE_REWRITE_MODEL_NAME",
    "base_url": "LANCE_REWRITE_BASE_URL",
}
_TEMPERATURE = 0.3
_MAX_TOKENS = 2048
_MAX_BYTES = 1 << 20
_IMAGE_SIDE = 1024
_INSTRUCTION = (
    "Turn the user's prompt into one English paragraph that describes a short video for a video generation model. "
    "Keep every subject, action, place and detail of the prompt, and add no subject, object or event of your own. "
    "Say what the scene looks like first: subjects, surroundings, light, colours, materials. Then say how the subjects "
    "move, and last how the camera moves. Translate other languages into English. "
    "Answer with the paragraph alone: no heading, list, quotation marks or remarks."
)
_IMAGE_INSTRUCTION = (
    "The image is the first frame of the video: describe what is to be seen in it, truly and in full, and take the "
    "motion from the prompt."
)


@dataclass(frozen=True)
class Rewriter:
    """A chat model behind an OpenAI-compatible endpoint.

    Attributes:
        base_url: address below which `/chat/completions` lies.
        timeout: seconds to wait for the endpoint to say something.
    """

    api_key: str
    model: str
    base_url: str = _DEFAULT_BASE_URL
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise LanceError(f"the rewriting endpoint {self.base_url} must begin with http:// or https://")
        if not (self.api_key.isascii() and self.api_key.isprintable() and self.base_url.isascii()):
            raise LanceError("the rewriting endpoint and its key must be plain ASCII")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Rewriter":
        """Read LANCE_REWRITE_API_KEY, LANCE_REWRITE_MODEL_NAME and, unless it is OpenAI's, LANCE_REWRITE_BASE_URL.

        Raises:
            LanceError: one of the first two is not set, or the address is not one.
        """
        values = {field: environment.get(name, "").strip() for field, name in _VARIABLES.items()}
        for field in ("api_key", "model"):
            if not values[field]:
                raise LanceError(f"rewriting needs {_VARIABLES[field]}, which is not set")
        return cls(values["api_key"], values["model"], values["base_url"] or _DEFAULT_BASE_URL)

    def rewrite(self, prompt: str, image: str | os.PathLike[str] | None = None, as_upstream: bool = False) -> str:
        """A detailed English prompt that means the same, for a video, one that begins with `image` if there is one.

        `as_upstream` is that of the request, which says how the image is read.

        Raises:
            LanceError: the prompt is empty, the image cannot be used, or the endpoint gives no usable answer.
        """
        if not prompt.strip():
            raise LanceError("an empty prompt cannot be rewritten")
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt.strip()}]
        instruction = _INSTRUCTION
        if image is not None:
            instruction = f"{_INSTRUCTION} {_IMAGE_INSTRUCTION}"
            content.append({"type": "image_url", "image_url": {"url": _data_url(image, as_upstream)}})
        answer = self._post(
            {
                "model": self.model,
                "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": content}],
                "max_tokens": _MAX_TOKENS,
                "temperature": _TEMPERATURE,
            }
        )
        try:
            text = answer["choices"][0]["message"]["content"].strip()
        except (LookupError, TypeError, AttributeError):
            raise LanceError(f"{self.base_url} answered without choices[0].message.content") from None
        if not text:
            raise LanceError(f"{self.base_url} answered with an empty text")
        return text

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout) as response:
                answer = response.read(_MAX_BYTES)
        except urllib.error.HTTPError as error:
            reason = _reason(error).replace(self.api_key, "***")
            raise LanceError(f"{self.base_url} answered with status {error.code}{reason}") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise LanceError(f"{self.base_url} cannot be reached ({_one_line(reason)})") from None
        try:
            return json.loads(answer)
        except ValueError:
            raise LanceError(f"{self.base_url} did not answer with JSON") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would hand the key to another server."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _data_url(path: str | os.PathLike[str], as_upstream: bool) -> str:
    """The image as the model sees it, no larger than a chat model looks at."""
    image = Image.fromarray(read_visual(path, "image", as_upstream).pixels[0])
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _reason(error: urllib.error.HTTPError) -> str:
    """What the endpoint says about its refusal, if it says it as OpenAI does."""
    try:
        return f": {_one_line(json.loads(error.read(_MAX_BYTES))['error']['message'])}"
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return ""


def _one_line(value: object) -> str:
    return " ".join(str(value).split()) or type(value).__name__
