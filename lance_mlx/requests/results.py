"""The folder that a request file's outputs go to, with upstream's names and its prompt.json and result.json."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lance_mlx.errors import LanceError, reason
from lance_mlx.files import check_place, locked, read_json
from lance_mlx.media.write import read_metadata, save_text
from lance_mlx.requests.files import Item, RequestsFile
from lance_mlx.requests.request import Question, Request

PROMPT_BEFORE_REWRITING = "prompt_before_rewriting"
"""Key of an output's metadata that holds the prompt of the request file, where the model was given another."""
_PROMPTS = "prompt.json"
_RESULTS = "result.json"
_QUESTIONS = "questions.json"


class ResultsFolder:
    """What is there already, and where the rest goes (bytedance/Lance inference_lance.py).

    Images and videos are named by number; prompt.json maps their names to their prompts. Answers are in prompt.json
    as they came, under the name of the visual's file, and in result.json with their questions. Where several questions
    are about one file, upstream keeps the last answer for all of them; here these are under the entries' keys, which
    upstream's result.json looks up too. What was asked, and of which model, is in questions.json here, and in the
    metadata of images and videos. Several processes may fill one folder: what another has noted stays.
    """

    def __init__(
        self,
        folder: Path,
        requests: RequestsFile,
        asked: Mapping[str, Request | Question],
        made_by: Mapping[str, Any],
        rewrites: bool,
        overwrite: bool,
    ) -> None:
        """See what is in the folder, which is made with the first file.

        Args:
            asked: what is made, by the entries' keys.
            made_by: `LanceModel.made_by` of the model that is used.
            rewrites: whether prompts are rewritten.
            overwrite: make anew what was made from another request.

        Raises:
            LanceError: the folder belongs to something else, or holds what was made from another request.
        """
        check_place(folder / _PROMPTS)
        self.folder = folder
        self._requests = requests
        self._asked = asked
        self._made_by = dict(made_by)
        self._rewrites = rewrites
        self._overwrite = overwrite
        self._files = Counter(Path(item.written[0]).name for item in requests.items if item.written)
        self._texts = _read_texts(folder / _PROMPTS)
        self._questions = _read_texts(folder / _QUESTIONS)
        # What this process adds to each.
        self._noted: dict[str, dict[str, str]] = {_PROMPTS: {}, _QUESTIONS: {}}
        self.pending = tuple(item for item in requests.items if not self._is_done(item))

    def paths(self, item: Item, num_frames: int) -> list[Path]:
        """The file for an image or a video, alone in a list."""
        return [self.folder / f"{item.name}{'.mp4' if num_frames > 1 else '.png'}"]

    def drawn(self, path: Path, prompt: str) -> None:
        """Note in prompt.json that an image or a video was made from a prompt."""
        self._noted[_PROMPTS][path.name] = prompt
        with locked(self.folder):
            self._write(_PROMPTS)

    def answered(self, item: Item, raw_text: str) -> None:
        """Note an answer, control tokens written out, in prompt.json, and in questions.json what it answers."""
        self._noted[_QUESTIONS][self._answer_key(item)] = self._question(item)
        self._noted[_PROMPTS][self._answer_key(item)] = raw_text
        with locked(self.folder):
            self._write(_QUESTIONS)
            self._write(_PROMPTS)

    def finish(self) -> None:
        """Write prompt.json, and result.json if the requests were questions."""
        with locked(self.folder):
            texts = self._write(_PROMPTS)
            if self._requests.task.answers:
                self._save(_RESULTS, [self._result(item, texts) for item in self._requests.items])

    def _is_done(self, item: Item) -> bool:
        if self._requests.task.answers:
            key = self._answer_key(item)
            # What upstream answered has no note.
            asked = self._questions.get(key, self._question(item))
            return key in self._texts and self._is_same(asked == self._question(item), f"{key} in {self.folder}")
        places = [*self.paths(item, 1), *self.paths(item, 2)]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            return False
        try:
            metadata = read_metadata(path)
        except LanceError:  # made by upstream, which leaves no trace
            metadata = None
        if not self._is_same(metadata is None or self._is_of(metadata, item), str(path)):
            return False
        # Stopped between the two files: the note is made up for.
        if path.name not in self._texts:
            prompt = item.text if metadata is None else metadata["request"]["prompt"]
            self._noted[_PROMPTS][path.name] = prompt
        return True

    def _is_same(self, same: bool, what: str) -> bool:
        """Whether an output can be left; raises LanceError for another request's that is not to be overwritten."""
        if not same and not self._overwrite:
            raise LanceError(
                f"{what} was made from another request: choose another --output, remove it, or give --overwrite"
            )
        return same

    def _is_of(self, metadata: Mapping[str, Any], item: Item) -> bool:
        """Whether an image or a video was made from this item, by the same model in the same way."""
        rewritten = PROMPT_BEFORE_REWRITING in metadata
        return rewritten == self._rewrites and is_made_from(metadata, self._asked[item.key], self._made_by)

    def _question(self, item: Item) -> str:
        """What an answer depends on."""
        asked = self._asked[item.key]
        sources = {"sources": [visual.digest() for visual in asked.visuals]}
        return json.dumps(asked.to_dict() | self._made_by | sources, ensure_ascii=False)

    def _answer_key(self, item: Item) -> str:
        name = Path(item.written[0]).name
        return name if self._files[name] == 1 else item.key

    def _result(self, item: Item, texts: Mapping[str, str]) -> dict[str, str | list[str]]:
        answer = texts.get(self._answer_key(item), "")
        visual = item.written[0] if len(item.written) == 1 else list(item.written)
        return {
            str(self._requests.task.takes): visual,
            "question": item.text,
            "answer": answer.replace("<|im_end|>", "").strip(),
        }

    def _write(self, name: str) -> dict[str, str]:
        """Add what this process has noted to a file; returns all that is in it then."""
        texts = _read_texts(self.folder / name) | self._noted[name]
        self._save(name, texts)
        return texts

    def _save(self, name: str, values: object) -> None:
        save_text(self.folder / name, json.dumps(values, ensure_ascii=False, indent=2))


def is_made_from(metadata: Mapping[str, Any], asked: Request, made_by: Mapping[str, Any]) -> bool:
    """Whether an image or a video with such metadata was made from a request, and from what its sources hold now.

    Args:
        made_by: `LanceModel.made_by` of the model that is used, None for what the metadata must not have.
    """
    try:
        made = Request.from_dict(metadata["request"])
    except (LanceError, KeyError):
        return False
    if asked.task.size_from_source:
        made = replace(made, height=asked.height, width=asked.width, num_frames=asked.num_frames)
    made = replace(made, prompt=metadata.get(PROMPT_BEFORE_REWRITING, made.prompt))
    same = all(metadata.get(name) == value for name, value in made_by.items())
    return same and made == asked and metadata.get("sources", []) == [visual.digest() for visual in asked.visuals]


def _read_texts(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        texts = read_json(path)
    except (OSError, ValueError) as error:
        raise LanceError(
            f"{path} is not readable JSON ({reason(error)}): choose another --output, or remove it"
        ) from None
    if not (isinstance(texts, Mapping) and all(isinstance(text, str) for text in texts.values())):
        raise LanceError(f"{path} does not map names to texts: choose another --output, or remove it")
    return dict(texts)
