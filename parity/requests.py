"""The requests of oracle bundles and layouts: which keys there are and what they may hold."""

import math
from typing import Any

from parity.errors import ParityError

# The tasks that both implementations run so far.
SUPPORTED_TASKS = ("t2i", "t2v")

_INTEGERS = ("height", "width", "num_frames", "num_steps")
_OTHER_INTEGERS = ("vae_resolution", "vit_resolution", "max_new_tokens", "seed")
_NUMBERS = ("timestep_shift", "cfg_text_scale", "cfg_renorm_min")
_GENERATION = (*_INTEGERS, "timestep_shift", "text_template")
_KEYS = {"task", "spec", "text_template", "resolution", "cfg_interval", "cfg_renorm_type"}
_KEYS |= {*_INTEGERS, *_OTHER_INTEGERS, *_NUMBERS}


def check_request(request: dict[str, Any], what: str) -> None:
    """Check a request's keys and values; `what` names its file in the ParityError that this raises."""
    task = request.get("task")
    if not isinstance(task, str) or not task:
        raise ParityError(f"{what}: the request names no task")
    unknown = sorted(set(request) - _KEYS)
    if unknown:
        raise ParityError(f"{what}: unknown request key {unknown[0]!r}")
    if task in SUPPORTED_TASKS:
        absent = [key for key in ("spec", *_GENERATION) if key not in request]
        if absent:
            raise ParityError(f"{what}: the request lacks {absent[0]!r}")
        if not isinstance(request["spec"], str):
            raise ParityError(f"{what}: the spec of a {task} request must be the prompt")
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


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
