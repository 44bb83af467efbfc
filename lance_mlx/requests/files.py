"""Upstream's request files (bytedance/Lance config/examples): read whole and checked before anything is made.

Text to image and text to video are a map of name -> prompt. All other tasks are a map of id -> entry, whose three
arrays hold elements (text, or paths of visuals), what each one is, and whether it is the target.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_mlx.errors import LanceError, reason
from lance_mlx.files import read_json
from lance_mlx.requests.prompt_data import PROMPT_DATA
from lance_mlx.requests.request import Task, Visual, VisualKind

_SUFFIXES = {".mp4": Task.T2V, ".png": Task.T2I, ".jpg": Task.T2I, ".jpeg": Task.T2I}
_KEYS = ("interleave_array", "element_dtype_array", "istarget_in_interleave")
_DTYPES = ("text", *VisualKind)
# How upstream names the tasks in its code, where the names differ.
_ALIASES = {"idip": Task.SUBJECT}


@dataclass(frozen=True)
class Item:
    """One entry of a request file.

    Attributes:
        key: its key in the file.
        name: what upstream names its output, without the suffix.
        text: the prompt, or the question.
        visuals: what it is given, their files found.
        written: the visuals' paths as they stand in the file.
        vision_type: what the instruction of an edit calls the input: the kind of the entry's last element.
        instruction: the system's part of a question.
        answer: the answer that is expected to a question.
    """

    key: str
    name: str
    text: str
    visuals: tuple[Visual, ...] = ()
    written: tuple[str, ...] = ()
    vision_type: str | None = None
    instruction: str | None = None
    answer: str = ""


@dataclass(frozen=True)
class RequestsFile:
    """A request file: its items are all of one task."""

    path: Path
    task: Task
    items: tuple[Item, ...]


def read_requests(path: str | os.PathLike[str], task: Task | None = None) -> RequestsFile:
    """Read a request file and find its visuals, relative to the working folder, the file's or one above that.

    Args:
        task: what the entries are for. When None it is told by the entries, or, where these fit several tasks (i2v,
            image_edit, subject), by the name of the file.

    Raises:
        LanceError: the file, or the first bad entry, naming it.
    """
    path = Path(path)
    entries = _read_json(path)
    task = task or _infer_task(path, entries)
    items = []
    for key, entry in entries.items():
        with naming_entry(path, key):
            items.append(_text_item(key, entry, task) if task.takes is None else _item(key, entry, task, path))
    names = [item.name for item in items]
    repeated = next((item for item in items if names.count(item.name) > 1), None)
    if repeated is not None:
        keys = " and ".join(f"'{item.key}'" for item in items if item.name == repeated.name)
        raise LanceError(f"{path}: entries {keys} would both be written as {repeated.name}: number them differently")
    return RequestsFile(path, task, tuple(items))


def caption_instruction(task: Task) -> str:
    """The instruction under which a visual is described without a question."""
    return PROMPT_DATA["instructions"]["caption"].format(vision_type=task.takes)


@contextmanager
def naming_entry(path: Path, key: str) -> Iterator[None]:
    """Say in a LanceError which entry of the file it is about."""
    try:
        yield
    except LanceError as error:
        raise LanceError(f"{path}: entry '{key}': {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = read_json(path, object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise LanceError(f"request file {path} does not exist") from None
    except LanceError as error:
        raise LanceError(f"request file {path}: {error}") from None
    except (OSError, ValueError) as error:
        raise LanceError(f"request file {path} is not readable JSON ({reason(error)})") from None
    if not isinstance(entries, dict):
        raise LanceError(f"request file {path} must hold a JSON object: name -> prompt, or id -> entry")
    if not entries:
        raise LanceError(f"request file {path} holds no entries")
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise LanceError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands there twice")
    return values


def _infer_task(path: Path, entries: dict[str, Any]) -> Task:
    fitting = {}
    for key, entry in entries.items():
        with naming_entry(path, key):
            fitting[key] = _fitting_tasks(key, entry)
    first, tasks = next(iter(fitting.items()))
    for key, others in fitting.items():
        if not tasks & others:
            raise LanceError(
                f"{path}: entry '{first}' is for {_either(tasks)}, but '{key}' for {_either(others)}: "
                "name the task, or part the file"
            )
        tasks = tasks & others
    if len(tasks) > 1:
        named = {task for task in tasks if re.search(rf"(?<![a-z0-9]){task}(?![a-z0-9])", path.stem.lower())}
        named |= {task for alias, task in _ALIASES.items() if alias in path.stem.lower()} & tasks
        tasks = named if len(named) == 1 else tasks
    if len(tasks) > 1:
        raise LanceError(f"{path}: the entries fit {_either(tasks)}: name the task before --requests")
    return next(iter(tasks))


def _fitting_tasks(key: str, entry: Any) -> set[Task]:
    """The tasks that an entry may be for, by its form."""
    if isinstance(entry, str):
        task = _SUFFIXES.get(Path(key).suffix.lower())
        return {task} if task else {Task.T2I, Task.T2V}
    _, dtypes, targets = element_lists(entry)
    answers = any(dtype == "text" and target for dtype, target in zip(dtypes, targets, strict=True))
    given = [dtype for dtype, target in zip(dtypes, targets, strict=True) if answers or not target]
    kind = VisualKind.VIDEO if "video" in given else VisualKind.IMAGE
    fitting = {task for task in Task if task.takes is kind and task.answers == answers}
    if given.count("image") > 1:
        fitting -= {Task.I2V}
    return fitting


def _either(tasks: Iterable[Task]) -> str:
    return " or ".join(task for task in Task if task in tasks)


def _name(key: str) -> str:
    """Upstream numbers its outputs by the key (validation_dataset.py:pro_index, inference_lance.py)."""
    number = re.fullmatch(r"([0-9]{1,18})(\.png|\.jpe?g|\.mp4)?", key, re.IGNORECASE)
    if not number:
        raise LanceError("its name must be a number, such as 000001.png or 0001")
    return f"{int(number[1]):06d}"


def _text_item(key: str, entry: Any, task: Task) -> Item:
    if not isinstance(entry, str):
        raise LanceError(f"task {task} needs a prompt, not {_kind(entry)}")
    return Item(key, _name(key), entry)


def _item(key: str, entry: Any, task: Task, path: Path) -> Item:
    if isinstance(entry, str):
        raise LanceError(f"task {task} needs an object with {', '.join(_KEYS)}, not a prompt alone")
    texts, written, visuals = [], [], []
    for element, dtype, target in zip(*element_lists(entry), strict=True):
        if dtype == "text":
            # As upstream: of a question the target counts; what is drawn has none.
            if target or not task.answers:
                texts.append(element)
        elif task.answers or not target:
            if not isinstance(element, str):
                raise LanceError(f"the {dtype} must be a path, not {_kind(element)}")
            if dtype != task.takes:
                raise LanceError(f"task {task} takes {'an image' if dtype == 'video' else 'a video'}, not {element}")
            written.append(element)
            visuals.append(Visual(str(_find(element, dtype, path)), VisualKind(dtype)))
    if len(texts) != 1:
        what = "one text with istarget_in_interleave 1" if task.answers else "one text"
        raise LanceError(f"task {task} needs {what}, not {len(texts)}")
    if not visuals:
        raise LanceError(f"task {task} needs {'an image' if task.takes is VisualKind.IMAGE else 'a video'}")
    given = [dtype for dtype, target in zip(*element_lists(entry)[1:], strict=True) if task.answers or not target]
    if "text" in given[1:-1]:
        raise LanceError("the text must stand before all visuals or after them, not between")
    found = tuple(visuals), tuple(written)
    if task.answers:
        instruction, question, answer = question_parts(texts[0], task)
        return Item(key, _name(key), question, *found, None, instruction, answer)
    if not isinstance(texts[0], str):
        raise LanceError(f"task {task} needs a prompt, not {_kind(texts[0])}")
    return Item(key, _name(key), texts[0], *found, None if task is Task.I2V else entry["element_dtype_array"][-1])


def element_lists(entry: Any) -> tuple[list, list, list]:
    """Elements of an entry, what they are, and whether each is the target; raises LanceError for other forms."""
    if not isinstance(entry, dict):
        raise LanceError(f"a prompt or an object with {', '.join(_KEYS)} is needed, not {_kind(entry)}")
    for name in _KEYS:
        if name not in entry:
            raise LanceError(f"the key '{name}' is missing")
        if not isinstance(entry[name], list):
            raise LanceError(f"'{name}' must be an array, not {_kind(entry[name])}")
    elements, dtypes, targets = (entry[name] for name in _KEYS)
    if not len(elements) == len(dtypes) == len(targets):
        lengths = " and ".join(f"{len(entry[name])} in {name}" for name in _KEYS)
        raise LanceError(f"the arrays must be of one length, not {lengths}")
    for dtype, target in zip(dtypes, targets, strict=True):
        if dtype not in _DTYPES:
            raise LanceError(f"unknown dtype {dtype!r} in element_dtype_array: use {', '.join(_DTYPES)}")
        if type(target) is not int or target not in (0, 1):
            raise LanceError(f"istarget_in_interleave holds {target!r}: use 0 or 1")
    return elements, dtypes, targets


def question_parts(text: Any, task: Task) -> tuple[str, str, str]:
    """Instruction, question and expected answer of a text element; a text alone is the caption that is expected.

    Raises:
        LanceError: it is neither.
    """
    if isinstance(text, str):
        return caption_instruction(task), "", text
    if not (isinstance(text, list) and len(text) == 3 and all(isinstance(part, str) for part in text)):
        raise LanceError(f"the text of task {task} must be [instruction, question, answer]")
    return tuple(text)


def _find(written: str, dtype: str, path: Path) -> Path:
    # Upstream's paths start at the root of its repository, a folder above its request files.
    for folder in (Path(), *path.absolute().parents):
        with suppress(OSError):  # a name that no file can have
            if (folder / written).is_file():
                return folder / written
    raise LanceError(f"{dtype} {written} is neither in the working folder nor beside the request file or above it")


def _kind(value: Any) -> str:
    kinds = {str: "a string", dict: "an object", list: "an array", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
