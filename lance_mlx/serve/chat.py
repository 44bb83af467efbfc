"""/v1/chat/completions: questions about images or a video.

The model answers one question. Of a conversation, the last message of the user is the question, about all that the
conversation shows; the system's message is the instruction; what was said in between is not read.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from lance_mlx.requests.request import Question, Task, Visual, VisualKind
from lance_mlx.serve.bodies import MODEL, ChatBody, parse
from lance_mlx.serve.bounds import BOUNDS
from lance_mlx.serve.errors import ApiError
from lance_mlx.serve.jobs import Job
from lance_mlx.serve.service import Service, read_json
from lance_mlx.serve.uploads import from_data_url

_ROLES = ("system", "developer", "user", "assistant")


def chat_routes(service: Service) -> APIRouter:
    """POST /v1/chat/completions."""
    router = APIRouter(prefix="/v1/chat")

    @router.post("/completions")
    async def completions(request: HttpRequest) -> Response:
        async with service.receiving(request) as folder:
            body = parse(ChatBody, await read_json(request))
            question = await run_in_threadpool(_question, body, folder)
            del body.messages  # which may hold much
            job = service.submit(question, folder)
        head = {"id": job.id.replace("video_", "chatcmpl-"), "created": int(time.time()), "model": MODEL}
        if body.stream:
            return service.stream(job, _chunks(head | {"object": "chat.completion.chunk"}), "data: [DONE]\n\n")

        def result(job: Job) -> dict[str, Any]:
            message = {"role": "assistant", "content": job.answer.text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(job)}
            return head | {"object": "chat.completion", "choices": [choice]}

        return await service.reply(request, job, result)

    return router


def _question(body: ChatBody, folder: Path) -> Question:
    """The question that a conversation ends in; raises ApiError for one that holds none."""
    instruction, text, visuals = None, None, []
    for index, message in enumerate(body.messages):
        role = message.get("role")
        if role not in _ROLES:
            raise ApiError(400, f"the role of a message must be one of {', '.join(_ROLES)}", param=f"messages.{index}")
        if role == "assistant":
            continue
        words, shown = _read(message.get("content"), index, folder, len(visuals))
        if role == "user":
            text = words
            visuals += shown
        elif shown:
            raise ApiError(400, "images and videos belong into the user's messages", param=f"messages.{index}")
        else:
            instruction = words
    if text is None:
        raise ApiError(400, "there is no message of the user", param="messages")
    kinds = {visual.kind for visual in visuals}
    if len(kinds) != 1:
        wrong = "both images and videos: ask about one kind" if kinds else "no image or video: attach one"
        raise ApiError(400, f"this model answers about what it is shown, and it is shown {wrong}", param="messages")
    task = Task.X2T_VIDEO if kinds == {VisualKind.VIDEO} else Task.X2T_IMAGE
    return body.question(task, text, instruction, tuple(visuals))


def _read(content: Any, index: int, folder: Path, before: int) -> tuple[str, list[Visual]]:
    """Text and visuals of one message."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ApiError(400, "content must be a text or a list of parts", param=f"messages.{index}.content")
    words, visuals = [], []
    for part in content:
        kind, value = part.get("type"), part.get(str(part.get("type")))
        if kind == "text" and isinstance(value, str):
            words.append(value)
            continue
        if kind not in ("image_url", "video_url", "file") or not isinstance(value, dict):
            wanted = "text, image_url, video_url or file"
            raise ApiError(400, f"a part must be of type {wanted}, with its value", param=f"messages.{index}.content")
        if before + len(visuals) >= BOUNDS.visuals:
            raise ApiError(400, f"a conversation may show at most {BOUNDS.visuals} images or videos", param="messages")
        expected = {"image_url": VisualKind.IMAGE, "video_url": VisualKind.VIDEO}.get(kind)
        visuals.append(from_data_url(value.get("file_data" if kind == "file" else "url"), folder, expected))
    text = "\n".join(words)
    if len(text) > BOUNDS.prompt:
        raise ApiError(400, f"a message may have at most {BOUNDS.prompt} characters", param=f"messages.{index}")
    return text, visuals


def _chunks(head: dict[str, Any]):
    """What a stream has to say about a job at each change."""
    sent = 0

    def news(job: Job) -> Iterator[dict[str, Any]]:
        nonlocal sent
        pieces, over = job.pieces[sent:], job.is_over
        if not sent and (pieces or over):
            yield _chunk(head, {"role": "assistant", "content": ""}, None)
        for piece in pieces:
            yield _chunk(head, {"content": piece}, None)
        sent += len(pieces)
        if over:
            yield _chunk(head, {}, _reason(job))

    return news


def _chunk(head: dict[str, Any], delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}


def _reason(job: Job) -> str:
    return "length" if len(job.answer.tokens) >= job.work.max_new_tokens else "stop"
