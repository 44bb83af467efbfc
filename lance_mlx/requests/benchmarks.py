"""Prompt files of public benchmarks, and the files that their evaluators read.

Each is taken as its evaluator has it and as bytedance/Lance has it in its `benchmarks/`:

- GenEval (djghosh13/geneval): JSON Lines of metadata with a "prompt", or of "data" with the metadata in
  "additional_info"; `00000/metadata.jsonl` and `00000/samples/0000.png`, with as many as there are samples.
- DPG-Bench (TencentQQGYLab/ELLA): a folder of .txt files, or JSON Lines of "index" and "data"; a picture named after
  each that holds its samples in rows of two.
- GEdit-Bench (stepfun-ai/Step1X-Edit): its .parquet files, or a request file whose entries have an "additional_info";
  `fullset/TASK_TYPE/LANGUAGE/KEY.png`, beside it `KEY_SRCIMG.png`, the source.
- VBench (Vchitect/VBench): VBench_full_info.json, a .txt file of a prompt a line, or JSON Lines of
  "original_prompt_en" and, in "data", of what the model is given in its place; `PROMPT-0.mp4`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lance_mlx.errors import LanceError, reason
from lance_mlx.files import opened, read_json
from lance_mlx.requests.files import naming_entry, read_requests
from lance_mlx.requests.request import Task

_FLICKERING, _FLICKERING_SAMPLES = "temporal_flickering", 25
"""Of a dimension of VBench: its static filter leaves some out."""


class Benchmark(StrEnum):
    """A benchmark whose prompts can be drawn."""

    GENEVAL = "geneval"
    DPG = "dpg"
    GEDIT = "gedit"
    VBENCH = "vbench"

    @property
    def task(self) -> Task:
        """What is made."""
        return {Benchmark.GEDIT: Task.IMAGE_EDIT, Benchmark.VBENCH: Task.T2V}.get(self, Task.T2I)

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of a request in which bytedance/Lance's scripts for it differ from the launcher."""
        if self is Benchmark.VBENCH:
            return {"timestep_shift": 3.0, "width": 848, "height": 480, "num_frames": 50}
        return {"num_steps": 50}

    @property
    def samples(self) -> int:
        """How many are made of a prompt."""
        return {Benchmark.GEDIT: 1, Benchmark.VBENCH: 5}.get(self, 4)

    @property
    def most_samples(self) -> int:
        """How many of a prompt its evaluator has a place for."""
        return {Benchmark.GEDIT: 1, Benchmark.DPG: 4}.get(self, 10_000)


@dataclass(frozen=True)
class Entry:
    """A prompt of a benchmark, and what is made of it; names are those within the output folder.

    Attributes:
        key: what the file calls it.
        outputs: names of the samples, whose seeds count up from the first one's.
        grid: name of the picture of all samples that takes their place.
        texts: other files to write, by name.
        source: name of a copy of the picture that is edited, as PNG.
        read_source: gives the bytes of that picture.
    """

    key: str
    prompt: str
    outputs: tuple[str, ...]
    grid: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    source: str | None = None
    read_source: Callable[[], bytes] = bytes

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all files that are left in the end."""
        return (*((self.grid,) if self.grid else self.outputs), *self.texts, *((self.source,) if self.source else ()))


def read_benchmark(benchmark: Benchmark, path: Path, samples: int | None = None) -> list[Entry]:
    """The entries of a prompt file, or of a folder of them.

    Args:
        samples: how many are made of each; by default as many as the benchmark asks for.

    Raises:
        LanceError: the file, or the first bad entry, naming it; or the benchmark takes fewer samples.
    """
    if samples is not None and not 1 <= samples <= benchmark.most_samples:
        raise LanceError(f"--samples {samples} must be between 1 and {benchmark.most_samples} for {benchmark}")
    readers = {
        Benchmark.GENEVAL: _geneval,
        Benchmark.DPG: _dpg,
        Benchmark.GEDIT: _gedit,
        Benchmark.VBENCH: _vbench,
    }
    try:
        entries = list(readers[benchmark](path, samples or benchmark.samples, samples is None))
    except FileNotFoundError:
        raise LanceError(f"prompts {path} do not exist") from None
    except (OSError, ValueError) as error:
        raise LanceError(f"prompts {path} are not readable ({reason(error)})") from None
    if not entries:
        raise LanceError(f"prompts {path} hold no prompt of {benchmark}")
    names: dict[str, str] = {}
    for entry in entries:
        for name in entry.names:
            if name in names:
                raise LanceError(f"{path}: entries '{names[name]}' and '{entry.key}' would both be written as {name}")
            names[name] = entry.key
    return entries


def _geneval(path: Path, samples: int, default: bool) -> Iterator[Entry]:
    for number, (key, record) in enumerate(_json_lines(path)):
        with naming_entry(path, key):
            metadata, prompt = record, "prompt"
            if "additional_info" in record:
                metadata, prompt = record["additional_info"], "data"
            folder = f"{number:05d}"
            outputs = tuple(f"{folder}/samples/{index:04d}.png" for index in range(samples))
            texts = {f"{folder}/metadata.jsonl": json.dumps(metadata, ensure_ascii=False)}
            yield Entry(key, _text(record, prompt), outputs, texts=texts)


def _dpg(path: Path, samples: int, default: bool) -> Iterator[Entry]:
    if path.is_dir():
        prompts = (
            (file.name, {"index": file.stem, "data": _read(file).strip()}) for file in sorted(path.glob("*.txt"))
        )
    else:
        prompts = _json_lines(path)
    for key, record in prompts:
        with naming_entry(path, key):
            name = _part(_text(record, "index"))
            if path.is_dir() and not record["data"]:
                raise LanceError("it is empty: write the prompt into it")
            outputs = tuple(f".samples/{name}-{index}.png" for index in range(samples))
            yield Entry(key, _text(record, "data"), outputs, grid=f"{name}.png")


def _vbench(path: Path, samples: int, default: bool) -> Iterator[Entry]:
    if path.suffix == ".json":
        records = read_json(path)
        if not isinstance(records, list):
            raise ValueError("an array of objects with prompt_en is needed")
        found = [(f"number {number}", record) for number, record in enumerate(records, start=1)]
    elif path.suffix == ".txt":
        found = [(line, {"prompt_en": line}) for line in map(str.strip, _read(path).splitlines()) if line]
    else:
        found = list(_json_lines(path))
    made: dict[str, Entry] = {}
    for key, record in found:
        with naming_entry(path, key):
            rewritten = isinstance(record, dict) and "original_prompt_en" in record
            name = _part(_text(record, "original_prompt_en" if rewritten else "prompt_en"))
            flickers = default and _FLICKERING in str(record.get("dimension"))
            count = _FLICKERING_SAMPLES if flickers else samples
            # Some stand there twice, for different dimensions.
            if name not in made or len(made[name].outputs) < count:
                outputs = tuple(f"{name}-{index}.mp4" for index in range(count))
                made[name] = Entry(key, _text(record, "data") if rewritten else name, outputs)
    yield from made.values()


def _gedit(path: Path, samples: int, default: bool) -> Iterator[Entry]:
    if path.is_dir() or path.suffix == ".parquet":
        yield from _parquet(path)
        return
    asked, values = read_requests(path, Task.IMAGE_EDIT), read_json(path)
    for item in asked.items:
        with naming_entry(path, item.key):
            if len(item.visuals) != 1:
                raise LanceError(f"one picture is edited, not {len(item.visuals)}")
            yield _edit(
                item.key, item.text, values[item.key].get("additional_info"), Path(item.visuals[0].path).read_bytes
            )


def _parquet(path: Path) -> Iterator[Entry]:
    for file in sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]:
        columns = ["key", "task_type", "instruction", "instruction_language"]
        for row, record in enumerate(_read_table(file, columns).to_pylist()):
            key = f"{file.name}, row {row + 1}"
            with naming_entry(path, key):
                yield _edit(key, _text(record, "instruction"), record, partial(_picture, file, row))


def _edit(key: str, prompt: str, info: Any, read_source: Callable[[], bytes]) -> Entry:
    folders = "/".join(_part(_text(info, name)) for name in ("task_type", "instruction_language"))
    name = f"fullset/{folders}/{_part(_text(info, 'key'))}"
    return Entry(key, prompt, (f"{name}.png",), source=f"{name}_SRCIMG.png", read_source=read_source)


def _read_table(file: Path, columns: list[str]) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise LanceError(
            f"{file} is Parquet, which needs pyarrow: pip install '.[benchmark]' in the checkout"
        ) from None
    table = parquet.read_table(file, columns=columns)
    missing = next((name for name in columns if name not in table.column_names), None)
    if missing is not None:
        raise LanceError(f"{file} has no column '{missing}': it is not GEdit-Bench's")
    return table


@lru_cache(maxsize=1)
def _pictures(file: Path) -> Any:
    """The pictures of one file, which its rows are taken from one after the other."""
    return _read_table(file, ["input_image"])["input_image"]


def _picture(file: Path, row: int) -> bytes:
    picture = _pictures(file)[row].as_py()
    if not isinstance(picture, dict) or not isinstance(picture.get("bytes"), bytes):
        raise ValueError("input_image holds no bytes")
    return picture["bytes"]


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a file, with what names them."""
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise LanceError(f"{path}: line {number} is not JSON: JSON Lines are needed") from None
            if not isinstance(record, dict):
                raise LanceError(f"{path}: line {number} is not an object")
            yield f"line {number}", record


def _read(path: Path) -> str:
    with opened(path) as file:
        return file.read().decode("utf-8-sig")


def _text(record: Any, key: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value:
        raise LanceError(f"it needs a text '{key}'")
    return value


def _part(name: str) -> str:
    """A name that becomes that of a file or folder."""
    unwritable = "/" in name or "\0" in name or name.encode(errors="ignore").decode() != name
    if unwritable or name in (".", ".."):
        raise LanceError(f"{name!r} cannot be the name of a file")
    return name
