"""The folder that a request file's outputs go to, with upstream's names and its prompt.json and result.json."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lance_mlx.errors import LanceError
from lance_mlx.files import read_json
from lance_mlx.media.write import read_metadata, save_text
from lance_mlx.requests.files import Item, RequestsFile

PROMPT_BEFORE_REWRITING = "prompt_before_rewriting"
"""Key of an output's metadata that holds the prompt of the request file, where the model was given another."""
_PROMPTS = "prompt.json"
_RESULTS = "result.json"


class ResultsFolder:
    """What is there already, and where the rest goes (bytedance/Lance inference_lance.py).

    Images and videos are named by number; prompt.json maps their names to their prompts. Answers are in prompt.json
    as they came, under the name of the visual's file, and in result.json with their questions. Where several questions
    are about one file, upstream keeps the last answer for all of them; here these are under the entries' keys, which
    upstream's result.json looks up too.
    """

    def __init__(self, folder: Path, requests: RequestsFile) -> None:
        """Make the folder, or see what is in it; raises LanceError for one that belongs to something else."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LanceError(f"output {folder} cannot be made ({error.strerror}): choose another folder") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise LanceError(f"output {folder} cannot be written to: choose another folder")
        self.folder = folder
        self._requests = requests
        self._files = Counter(Path(item.written[0]).name for item in requests.items if item.written)
        self._texts = _read_prompts(folder / _PROMPTS)
        self.pending = tuple(item for item in requests.items if not self._is_done(item))

    def path(self, item: Item, num_frames: int) -> Path:
        """The file for an image or a video."""
        return self.folder / f"{item.name}{'.mp4' if num_frames > 1 else '.png'}"

    def drawn(self, path: Path, prompt: str) -> None:
        """Note in prompt.json that an image or a video was made from a prompt."""
        self._texts[path.name] = prompt
        self._write(_PROMPTS, self._texts)

    def answered(self, item: Item, raw_text: str) -> None:
        """Note an answer, control tokens written out, in prompt.json."""
        self._texts[self._answer_key(item)] = raw_text
        self._write(_PROMPTS, self._texts)

    def finish(self) -> None:
        """Write prompt.json, and result.json if the requests were questions."""
        self._write(_PROMPTS, self._texts)
        if self._requests.task.answers:
            self._write(_RESULTS, [self._result(item) for item in self._requests.items])

    def _is_done(self, item: Item) -> bool:
        if self._requests.task.answers:
            return self._answer_key(item) in self._texts
        path = next((path for path in (self.path(item, 1), self.path(item, 2)) if path.is_file()), None)
        if path is None:
            return False
        made_from = self._check_origin(path, item)
        # Stopped between the two files: the note is made up for.
        self._texts.setdefault(path.name, made_from)
        return True

    def _check_origin(self, path: Path, item: Item) -> str:
        """The prompt that an output was made from; raises LanceError where it is not this item's."""
        try:
            metadata = read_metadata(path)
            made = metadata["request"]
            prompt, asked = made["prompt"], metadata.get(PROMPT_BEFORE_REWRITING, made["prompt"])
            same = made["task"] == self._requests.task and asked == item.text
        except (LanceError, KeyError, TypeError):  # made by upstream, which leaves no trace
            return item.text
        if not same:
            raise LanceError(f"{path} was made from another request: choose another --output, or remove it")
        return prompt

    def _answer_key(self, item: Item) -> str:
        name = Path(item.written[0]).name
        return name if self._files[name] == 1 else item.key

    def _result(self, item: Item) -> dict[str, str | list[str]]:
        answer = self._texts.get(self._answer_key(item), "")
        visual = item.written[0] if len(item.written) == 1 else list(item.written)
        return {
            str(self._requests.task.takes): visual,
            "question": item.text,
            "answer": answer.replace("<|im_end|>", "").strip(),
        }

    def _write(self, name: str, values: object) -> None:
        save_text(self.folder / name, json.dumps(values, ensure_ascii=False, indent=2))


def _read_prompts(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        texts = read_json(path)
    except (OSError, ValueError) as error:
        raise LanceError(f"{path} is not readable JSON ({error}): choose another --output, or remove it") from None
    if not (isinstance(texts, Mapping) and all(isinstance(text, str) for text in texts.values())):
        raise LanceError(f"{path} does not map names to texts: choose another --output, or remove it")
    return dict(texts)
