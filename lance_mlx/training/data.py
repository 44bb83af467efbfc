"""What a run learns from: a folder of captioned images and videos, or JSON Lines with upstream's element lists."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lance_mlx.errors import LanceError, reason
from lance_mlx.files import opened
from lance_mlx.requests.files import element_lists, question_parts
from lance_mlx.requests.request import Question, Request, Task, Visual, VisualKind

_SUFFIXES = dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif"), VisualKind.IMAGE)
_SUFFIXES |= dict.fromkeys((".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi"), VisualKind.VIDEO)
_LINES = ".jsonl"
_CAPTIONED = {VisualKind.IMAGE: Task.T2I, VisualKind.VIDEO: Task.T2V}
_FRAMES_OF_I2V = 5


class Example(NamedTuple):
    """One thing to learn.

    Attributes:
        where: what names it in errors, empty where the names of its files do.
        request: what it answers; a drawing's size is not known yet.
        target: what is to be drawn, None for a question, which has its answer.
    """

    where: str
    request: Request | Question
    target: Visual | None

    @property
    def task(self) -> Task:
        """The task that is learned."""
        return self.request.task

    @property
    def looked_at(self) -> tuple[Visual, ...]:
        """What the ViT sees, in order."""
        return () if self.task is Task.I2V else self.request.visuals

    @property
    def encoded(self) -> tuple[Visual, ...]:
        """What the VAE encodes, the target last."""
        return (*self.looked_at, self.target) if self.target else ()


def read_data(path: Path) -> list[Example]:
    """The examples of a folder, by name, or of a .jsonl file, in order.

    Raises:
        LanceError: nothing is there, or the first example that cannot be used, naming its file, or file and line.
    """
    if path.suffix.lower() == _LINES and path.is_file():
        return _read_lines(path)
    if path.is_dir():
        return _read_folder(path)
    raise LanceError(
        f"data {path} is neither a folder of images or videos with a .txt beside each, nor a {_LINES} file"
    )


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say in a LanceError which example it is about."""
    try:
        yield
    except LanceError as error:
        raise LanceError(f"{where}: {error}" if where else str(error)) from None


def _read_folder(folder: Path) -> list[Example]:
    found = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES):
        beside, visual = path.with_suffix(".txt"), Visual(str(path), _SUFFIXES[path.suffix.lower()])
        try:
            with opened(beside) as file:
                caption = " ".join(file.read().decode("utf-8-sig").split())
        except FileNotFoundError:
            raise LanceError(f"{path} has no caption: write one in {beside.name} beside it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise LanceError(f"caption {beside} cannot be read ({reason(error)})") from None
        if not caption:
            raise LanceError(f"caption {beside} is empty")
        with naming(str(beside)):
            found.append(Example("", Request(_CAPTIONED[visual.kind], caption), visual))
    if not found:
        raise LanceError(f"data {folder} holds no image or video: {', '.join(_SUFFIXES)} are read")
    return found


def _read_lines(path: Path) -> list[Example]:
    found = []
    try:
        with opened(path) as file:
            lines = file.read().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LanceError(f"data {path} cannot be read ({reason(error)})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LanceError(f"{where}: it is not JSON ({reason(error)})") from None
        with naming(where):
            found.append(_example(where, entry, path.parent))
    if not found:
        raise LanceError(f"data {path} holds no line")
    return found


def _example(where: str, entry: Any, folder: Path) -> Example:
    """An entry with upstream's element lists; its paths are relative to `folder`."""
    given, drawn, texts, answers = [], [], [], []
    for element, dtype, target in zip(*element_lists(entry), strict=True):
        if dtype == "text":
            (answers if target else texts).append(element)
        else:
            (drawn if target else given).append(_visual(element, dtype, folder))
    if len(answers) + len(drawn) != 1:
        raise LanceError(f"istarget_in_interleave marks {len(answers) + len(drawn)} elements: one is to be learned")
    if answers:
        return _answered(where, _task(entry, _questions(given)), answers[0], texts, given)
    task = _task(entry, _drawings(given, drawn[0]))
    if len(texts) != 1 or not isinstance(texts[0], str) or not texts[0].strip():
        raise LanceError(f"task {task} needs one text that is not empty beside its target")
    frames = _FRAMES_OF_I2V if task is Task.I2V else 1
    # The picture that is animated is the first frame of what is learned.
    visuals = (Visual(drawn[0].path, VisualKind.IMAGE),) if task is Task.I2V else tuple(given)
    return Example(where, Request(task, texts[0], visuals=visuals, num_frames=frames), drawn[0])


def _answered(where: str, task: Task, text: Any, others: Sequence[Any], given: Sequence[Visual]) -> Example:
    if others:
        raise LanceError(f"task {task} needs one text, [instruction, question, answer], which is the target")
    instruction, question, answer = question_parts(text, task)
    if not answer.strip():
        raise LanceError("the answer is empty: there is nothing to learn")
    return Example(where, Question(task, question, tuple(given), instruction, answer), None)


def _questions(given: Sequence[Visual]) -> tuple[Task, ...]:
    """The tasks that a question about something may be of."""
    if not given:
        raise LanceError("a question needs an image or a video that it is about")
    return (Task.X2T_VIDEO if any(visual.kind is VisualKind.VIDEO for visual in given) else Task.X2T_IMAGE,)


def _drawings(given: Sequence[Visual], drawn: Visual) -> tuple[Task, ...]:
    """The tasks that something drawn may be of, the usual one first."""
    moves = drawn.kind is VisualKind.VIDEO
    if not given:
        return (Task.T2V, Task.I2V) if moves else (Task.T2I,)
    if any(visual.kind is not drawn.kind for visual in given):
        raise LanceError(
            "an image and a video make no task together: to learn i2v, leave the image out and add "
            '"task": "i2v", which gives the first frame of the video'
        )
    return (Task.VIDEO_EDIT,) if moves else (Task.IMAGE_EDIT, Task.SUBJECT)


def _task(entry: dict[str, Any], fitting: tuple[Task, ...]) -> Task:
    named = entry.get("task", fitting[0])
    found = next((task for task in fitting if task == named), None)
    if found is None:
        raise LanceError(f"'task' is {named!r}, and the elements are of {' or '.join(fitting)}")
    return found


def _visual(element: Any, dtype: str, folder: Path) -> Visual:
    if not isinstance(element, str) or not element or "\0" in element:
        raise LanceError(f"the {dtype} must be a path, not {element!r}")
    path = folder / element
    try:
        found = path.is_file()
    except OSError as error:
        raise LanceError(f"{dtype} {path} cannot be read ({error.strerror})") from None
    if not found:
        raise LanceError(f"{dtype} {path} does not exist: paths are relative to the file that names them")
    return Visual(str(path), VisualKind(dtype))
