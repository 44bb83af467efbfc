"""Several outputs of one run: their prompts, their seeds, and their names."""

import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from typer.core import TyperCommand

from lance_mlx.errors import LanceError
from lance_mlx.files import opened

DEFAULT_SEED = 42
MAX_OUTPUTS = 10_000
_STDIN = "-"


class TakesSeeds(TyperCommand):
    """A command to which `--seed 1 2 3` is `--seed 1 --seed 2 --seed 3`, and `--lora PATH [SCALE]` is `--lora PATH
    --lora-scale SCALE`, SCALE 1 where there is none."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """As click's, of the arguments so spread."""
        spread: list[str] = []
        before = None
        for word in args:
            if before == "--lora" or word.startswith("--lora="):
                spread += [word, "--lora-scale", "1"]
                before = "lora"
                continue
            if before == "lora" and is_number(word):
                spread[-1], before = word, word
                continue
            number = word.isdecimal()
            if number and before == "seed":
                spread.append("--seed")
            spread.append(word)
            before = "seed" if number and before in ("seed", "--seed") else word
        return super().parse_args(ctx, spread)


def is_number(word: str) -> bool:
    """Whether a word is a number that is finite."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts that are given, `-` standing for what stdin holds, or those of a file, one a line.

    Raises:
        LanceError: both are given, stdin or the file cannot be read, or the file holds none.
    """
    if file is None:
        if list(prompts).count(_STDIN) > 1:
            raise LanceError("--prompt - reads all of stdin: give it once")
        return [_read_stdin() if prompt == _STDIN else prompt for prompt in prompts]
    if prompts:
        raise LanceError("give --prompt or --prompts-file, not both")
    try:
        text = _read_stdin() if str(file) == _STDIN else _read(file)
    except OSError as error:
        raise LanceError(f"prompts file {file} cannot be read ({error.strerror})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise LanceError(f"prompts file {file} holds no prompt: write one a line")
    return lines


def _read(file: Path) -> str:
    with opened(file) as prompts:
        return _decoded(prompts.read(), f"prompts file {file}")


def _read_stdin() -> str:
    return _decoded(sys.stdin.buffer.read(), "stdin").strip()


def _decoded(text: bytes, what: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LanceError(f"{what} is not UTF-8") from None


def choose_seeds(seeds: Sequence[int] | None, auto_seeds: int | None, num_images: int | None = None) -> list[int]:
    """The seeds that are given, so many from the one on, or so many random ones; raises LanceError for more than one of
    these, and for a seed that repeats."""
    for option, count in (("--auto-seeds", auto_seeds), ("--num-images", num_images)):
        if count is not None and not 1 <= count <= MAX_OUTPUTS:
            raise LanceError(f"{option} {count} must be between 1 and {MAX_OUTPUTS}, the most of one run")
    if num_images is not None:
        if auto_seeds is not None or len(seeds or ()) > 1:
            raise LanceError("--num-images counts on from one --seed: give neither several nor --auto-seeds")
        first = seeds[0] if seeds else DEFAULT_SEED
        return list(range(first, first + num_images))
    if auto_seeds is not None:
        if seeds:
            raise LanceError("give --seed or --auto-seeds, not both")
        return random.SystemRandom().sample(range(2**32), auto_seeds)
    repeated = next((seed for seed in seeds or () if seeds.count(seed) > 1), None)
    if repeated is not None:
        raise LanceError(f"--seed {repeated} is given twice: it would make the same again")
    return list(seeds or (DEFAULT_SEED,))


def name_outputs(output: Path | None, default: str, prompts: int, seeds: Sequence[int]) -> list[Path]:
    """The files of all prompts with all seeds, those of one prompt together.

    `{seed}` in a name is the seed, `{index}` the number of the prompt from 1; what tells several apart and is not in
    the name comes at its end.

    Args:
        default: the name without an output, `TASK.SUFFIX`.

    Raises:
        LanceError: there are too many, or two would have one name.
    """
    if prompts * len(seeds) > MAX_OUTPUTS:
        raise LanceError(f"{prompts} prompts with {len(seeds)} seeds are more than {MAX_OUTPUTS} outputs of one run")
    template = output or Path(default)
    for field, needed in (("index", prompts > 1), ("seed", len(seeds) > 1 or output is None)):
        if needed and f"{{{field}}}" not in str(template):
            template = template.with_name(f"{template.stem}-{{{field}}}{template.suffix}")
    paths = [
        Path(str(template).replace("{seed}", str(seed)).replace("{index}", str(index)))
        for index in range(1, prompts + 1)
        for seed in seeds
    ]
    path, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise LanceError(
            f"--output {output} names {path} {count} times: part {{index}} and {{seed}} by a letter or a dash"
        )
    return paths
