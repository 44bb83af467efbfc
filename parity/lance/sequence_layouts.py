"""Compares the integer layouts of sequences at real scale: exact, without weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parity.bundle.reading import read_json
from parity.comparison.verdict import AGREE, DIVERGE, UNUSABLE
from parity.errors import ParityError, one_line
from parity.lance.replay_mlx import layout_mlx
from parity.lance.replay_torch import layout_reference
from parity.lance.requests import SUPPORTED_TASKS, check_request
from parity.tensors.metrics import bits

FORMAT = "lance-layout/1"
TOKENIZER_FILES = ("vocab.json", "merges.txt")
REPOSITORY_TOKENIZER = Path(__file__).parents[2] / "tests" / "data" / "tokenizer"


@dataclass(frozen=True)
class Layout:
    """A captured layout: the request and the arrays that upstream made of it, int32 (timesteps float32).

    `media` is the folder that the request's paths of images and videos start from.
    """

    name: str
    request: dict
    arrays: dict[str, np.ndarray]
    media: Path

    @property
    def supported(self) -> bool:
        """Whether the task exists in the implementations so far."""
        return self.request["task"] in SUPPORTED_TASKS

    @property
    def tokens(self) -> int:
        """The length of the sequence."""
        return len(self.arrays["text_ids"])


@dataclass(frozen=True)
class LayoutResult:
    """One layout compared with one implementation; `seconds` went into building it, loading the tokenizer included."""

    layout: str
    impl: str
    verdict: str
    tokens: int
    compared: int
    seconds: float
    detail: str = ""


def read_layouts(folder: Path) -> list[Layout]:
    """Read every layout in a folder, in order of name; raises ParityError for one that is unusable, or for none."""
    if not folder.is_dir():
        raise ParityError(f"{folder} is not a folder: name the folder that holds the layouts' .json and .npz files")
    layouts = [read_layout(path) for path in sorted(folder.glob("*.npz"))]
    lonely = [path for path in sorted(folder.glob("*.json")) if not path.with_suffix(".npz").exists()]
    if lonely:
        raise ParityError(f"{lonely[0]} has no {lonely[0].with_suffix('.npz').name} beside it: copy the layout again")
    if not layouts:
        raise ParityError(f"{folder} holds no layouts: name the folder that holds their .json and .npz files")
    return layouts


def read_layout(path: Path) -> Layout:
    """Read one layout from its .npz and the .json beside it; raises ParityError."""
    document = read_json(path.with_suffix(".json"))
    if document.get("format") != FORMAT or not isinstance(document.get("request"), dict):
        raise ParityError(f"{path.with_suffix('.json')} is not a {FORMAT} file with a request: copy the layout again")
    check_request(document["request"], path.with_suffix(".json").name)
    if not path.is_file():
        raise ParityError(f"{path} is no file: copy it again")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # the parsers of NumPy and zipfile raise many kinds
        raise ParityError(f"{path} is not a complete .npz file ({error}): copy it again") from error
    if "text_ids" not in arrays:
        raise ParityError(f"{path} has no text_ids: copy the layout again")
    return Layout(path.stem, document["request"], arrays, path.resolve().parents[1])


def find_tokenizer(folder: Path, given: Path | None = None) -> Path:
    """Return the folder of the tokenizer for the layouts in `folder`; raises ParityError when there is none."""
    above = (folder, folder / "..", folder / ".." / "..")
    for place in [given] if given else [*(parent / "tokenizer" for parent in above), REPOSITORY_TOKENIZER]:
        if all((place / name).is_file() for name in TOKENIZER_FILES):
            return place
    where = given or f"{folder} or above it"
    raise ParityError(f"no tokenizer ({', '.join(TOKENIZER_FILES)}) in {where}: name its folder with --tokenizer")


Builder = Callable[[dict, Path, Path], dict[str, np.ndarray]]
"""Lays a request out, with the folders of the tokenizer and of the media."""
BUILDERS: dict[str, Builder] = {"mlx": layout_mlx, "reference": layout_reference}


def check_layout(layout: Layout, impl: str, build: Builder, tokenizer: Path) -> LayoutResult:
    """Build a layout's request and compare every array, bit for bit; `impl` is what to call the builder."""
    start = time.perf_counter()
    with one_line(f"{impl} cannot lay out the request"):
        built = build(layout.request, tokenizer, layout.media)
    seconds = time.perf_counter() - start
    missing = [name for name in layout.arrays if name not in built]
    compared = [name for name in layout.arrays if name in built]
    wrong = [text for name in compared if (text := _difference(name, layout.arrays[name], built[name]))]
    verdict = DIVERGE if wrong else UNUSABLE if missing or not compared else AGREE
    detail = "; ".join(wrong or [f"{name} was not built" for name in missing])
    return LayoutResult(layout.name, impl, verdict, layout.tokens, len(compared), seconds, detail)


def _difference(name: str, oracle: np.ndarray, ours: np.ndarray) -> str | None:
    if ours.dtype != oracle.dtype or ours.shape != oracle.shape:
        return f"{name} is {ours.dtype}{list(ours.shape)} instead of {oracle.dtype}{list(oracle.shape)}"
    if oracle.tobytes() == ours.tobytes():
        return None
    at = tuple(int(i) for i in np.argwhere(bits(oracle) != bits(ours))[0])
    return f"{name} is {ours[at]} at {list(at)} where the oracle has {oracle[at]}"
