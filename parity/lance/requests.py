"""The requests of oracle bundles and layouts: which keys there are and what they may hold."""

import sys
from typing import Any

from parity.errors import ParityError

# The tasks that both implementations run.
DRAWN_FROM_TEXT = ("t2i", "t2v")
DRAWN_FROM_VISUALS = ("i2v", "image_edit", "video_edit", "idip", "image_idip", "video_idip")
ANSWERED = ("x2t_image", "x2t_video")
SUPPORTED_TASKS = (*DRAWN_FROM_TEXT, *DRAWN_FROM_VISUALS, *ANSWERED)
_SPEC_KEYS = ("interleave_array", "element_dtype_array", "istarget_in_interleave")

_INTEGERS = ("height", "width", "num_frames", "num_steps")
_OTHER_INTEGERS = ("vae_resolution", "vit_resolution", "max_new_tokens", "seed")
_NUMBERS = ("timestep_shift", "cfg_text_scale", "cfg_renorm_min")
_GENERATION = (*_INTEGERS, "timestep_shift", "text_template")
_KEYS = {"task", "spec", "text_template", "resolution", "cfg_interval", "cfg_renorm_type"}
_KEYS |= {*_INTEGERS, *_OTHER_INTEGERS, *_NUMBERS}


def check_request(request: dict[str, Any], what: str, remedy: str = "restore it, or capture it again") -> None:
    """Check a request's keys and values; `what` names its file in the ParityError that this raises."""
    try:
        _check(request, what)
    except ParityError as error:
        raise ParityError(f"{error}: {remedy}") from None


def _check(request: dict[str, Any], what: str) -> None:
    task = request.get("task")
    if not isinstance(task, str) or not task:
        raise ParityError(f"{what}: the request names no task")
    unknown = sorted(set(request) - _KEYS)
    if unknown:
        raise ParityError(f"{what}: unknown request key {unknown[0]!r}")
    if task in SUPPORTED_TASKS:
        needed = ("spec",) if task in ANSWERED else ("spec", *_GENERATION)
        absent = [key for key in needed if key not in request]
        if absent:
            raise ParityError(f"{what}: the request lacks {absent[0]!r}")
        _check_spec(task, request["spec"], what)
    for key, value in request.items():
        if key in (*_INTEGERS, *_OTHER_INTEGERS) and not (_is_integer(value) and value >= (0 if key == "seed" else 1)):
            raise ParityError(f"{what}: {key} must be a positive integer, not {value!r}")
        if key in _NUMBERS and not _is_number(value):
            raise ParityError(f"{what}: {key} must be a finite number, not {value!r}")
        if key == "text_template" and not isinstance(value, bool):
            raise ParityError(f"{what}: text_template must be true or false, not {value!r}")
        if key == "cfg_interval" and not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))):
            raise ParityError(f"{what}: cfg_interval must be two numbers, not {value!r}")
        if key == "cfg_renorm_type" and not (value is None or isinstance(value, str)):
            raise ParityError(f"{what}: cfg_renorm_type must be a name, not {value!r}")


def _check_spec(task: str, spec: Any, what: str) -> None:
    if task in DRAWN_FROM_TEXT:
        if not isinstance(spec, str):
            raise ParityError(f"{what}: the spec of a {task} request must be the prompt")
        return
    if not isinstance(spec, dict) or not all(isinstance(spec.get(key), list) for key in _SPEC_KEYS):
        raise ParityError(f"{what}: the spec of a {task} request must hold the lists {', '.join(_SPEC_KEYS)}")
    elements, kinds = spec["interleave_array"], spec["element_dtype_array"]
    if len(elements) != len(kinds) or len(elements) != len(spec["istarget_in_interleave"]):
        raise ParityError(f"{what}: the lists of the spec differ in length")
    if kinds.count("text") != 1 or not {"image", "video"} & set(kinds) or set(kinds) - {"text", "image", "video"}:
        raise ParityError(f"{what}: the spec of a {task} request must hold one text and images or videos")
    for element, kind in zip(elements, kinds, strict=True):
        parts = element if kind == "text" and task in ANSWERED else [element]
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ParityError(f"{what}: {element!r} in the spec is not a {kind} of a {task} request")
        if kind == "text" and task in ANSWERED and len(parts) != 3:
            raise ParityError(f"{what}: the text of a {task} request must be instruction, question and answer")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
