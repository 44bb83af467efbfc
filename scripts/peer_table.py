"""What localize says of the public MLX port, as the tables of examples/README.md.

    LANCE_PEER=CLONE python scripts/peer_table.py ORACLES --python PATH [--only NAME]... [--output FILE]

ORACLES holds bundles captured from upstream and their checkpoint. One of three steps, of which the last is not guided,
is recorded of the reference in a temporary folder. The first table has every departure of the port and where it is
named, the second every finding; in bundles that draw in float32 with what part of the error of the latent and of the
pixels it makes (localize --attribute). Exit status: 0 written, 1 when a departure is not named, or less than 95 % of
the difference removed, 2 when a bundle cannot be used.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import tables
import typer

from parity.bundle.reading import read_bundle
from parity.cli.errors import one_line_errors
from parity.cli.results import PythonOption
from parity.errors import ParityError
from parity.lance.faults import PROFILES
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.localize.attribution import Attribution
from parity.localize.findings import Localization
from parity.localize.investigation import localize
from parity.ports.loading import port_loader
from parity.report.runner import limit_threads
from parity.report.terminal import progress_bar
from parity.report.words import percent

EXAMPLES = Path(__file__).parents[1] / "examples"
ADAPTER = str(EXAMPLES / "xocialize_lance_mlx.py:Port")
EARLIER = "xocialize-lance-mlx-earlier"
LEAST = 0.95


class Case(NamedTuple):
    """A run of the port: what it is called, the bundle, and what is done to it."""

    name: str
    bundle: str
    bits: str = ""
    profile: str = ""


SHORT, QUANTIZED, I2V = "t2i, 3 steps", "t2i, 3 steps, 8 bits", "i2v-fp32-kv"
BUNDLES = ("t2i-fp32-kv", "t2v-fp32-kv", "image_edit-fp32-kv", "x2t_image-fp32-kv", "x2t_video-fp32-kv", "t2v-bf16-kv")
T2I, T2V, EDIT, LOOK, WATCH, NARROW = BUNDLES
BEFORE, ASKED_BEFORE = "t2v, imitated", "x2t_image, imitated"
CASES = (
    *(Case(name, name) for name in BUNDLES),
    Case(SHORT, "short"),
    Case(QUANTIZED, "short", bits="8"),
    Case(I2V, I2V),
    Case(BEFORE, T2V, profile=EARLIER),
    Case(ASKED_BEFORE, LOOK, profile=EARLIER),
)
# Each departure, the run that shows it, and what it is called there: the beginning of an explanation, or a part of what
# is said beside the findings, or in place of them.
DEPARTURES = (
    ("one latent frame goes through the temporal convolution, the first of 3 is taken", T2I, "the first frame goes"),
    ("temporal stride 1", T2V, "the temporal stride is 1"),
    ("the grid of a video starts at 0", T2V, "the target's grid starts at 0"),
    (
        "cells of an image are anchored at 1000, its brackets are not",
        T2I,
        "the target's first cell is anchored at 1000",
    ),
    ("cells of an edit's source are", EDIT, "the source's first cell is anchored at 1000"),
    ("cells of an edit's target are", EDIT, "the target's first cell is anchored at 1000"),
    ("edits have no ViT", EDIT, "the ViT block is missing"),
    ("latents and brackets do not see each other", T2V, "latents and brackets do not see each other"),
    ("ViT blocks attend causally", LOOK, "no key after the query is seen"),
    ("temporal stride 1 in questions about videos", WATCH, "the temporal stride is 1"),
    ("guidance acts at every step", SHORT, "guidance acts at every step"),
    ("the renorm is by channel", T2V, "the renorm is per token"),
    ("the unconditional arm counts its positions anew", T2V, "the unconditional prefix is recomputed"),
    ("the Euler state is float32", NARROW, "the Euler state is kept in float32"),
    ("RoPE's frequencies are not rounded", NARROW, "frequencies, cosines and sines are float32"),
    ("the VAE's encoder gives its mean", EDIT, "the latent is the mean"),
    ("an ASCII apostrophe in the edit instruction", EDIT, "the instruction has an ASCII apostrophe"),
    ("pixels are cut off to bytes", T2V, "each value is (127.5 x + 127.5) rounded down"),
    ("pictures are stretched to a size", EDIT, "pictures are stretched to the size asked for"),
    ("no image to video", I2V, "xocialize/lance-mlx has no i2v"),
    ("before: a video is anchored at 2000", BEFORE, "the target is anchored at 2000"),
    ("before: guidance against an empty prompt", BEFORE, "the unconditional arm is an empty prompt"),
    ("before: the denoised block attends causally", BEFORE, "no key after the query is seen"),
    ("before: the answering head is tied", ASKED_BEFORE, "the head is tied"),
    ("norms in float32", NARROW, "the weight is kept in float32"),
    ("the residual stream in float32", NARROW, "the residual stream is kept in float32"),
    ("the bracket after a video's grid restarts", T2V, "the target's closing bracket restarts"),
    ("no closing <|im_end|>", T2V, "the closing <|im_end|> is missing"),
    ("times are off in the last bit", SHORT, "1 of 4 timesteps are off"),
    ("quantized: the noise becomes whole numbers", QUANTIZED, "the noise is cast to an unsigned integer"),
)


def main(
    oracles: Annotated[Path, typer.Argument(help="Folder of bundles.")],
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this run; may be repeated.")] = None,
    python: PythonOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Of several runs the file's tables.")] = EXAMPLES
    / "README.md",
) -> None:
    """Look at the port and write the tables."""
    with one_line_errors():
        limit_threads()
        cases = [case for case in CASES if only is None or case.name in only]
        told: dict[str, Localization | str] = {}
        with tempfile.TemporaryDirectory() as folder, progress_bar(len(cases), "run") as start:
            for case in cases:
                path = short_of(Path(folder), oracles) if case.bundle == "short" else oracles / case.bundle
                told[case.name] = look(case, path, python, start(case.name))
        rows = list(departures(told))
        text = tables.table(("departure", "run", "it is told as", "removes"), [row for *row, _ in rows])
        found = {name: one for name, one in told.items() if name in (*BUNDLES, SHORT) and not isinstance(one, str)}
        text += "\n" + findings(found)
        if only is None:
            tables.replace_between(output, "port", text)
        print(text, end="")
        raise typer.Exit(int(not all(named for *_, named in rows)))


def short_of(folder: Path, oracles: Path) -> Path:
    """The bundle of three steps, recorded of the reference unless it is there."""
    path = folder / "short"
    if not path.exists():
        options = Options(prompt="a red bird", width=64, height=48, steps=3, timestep_shift=1.0)
        record(path, read_bundle(oracles / T2I).checkpoint, build_request("t2i", options), dtype="float32")
    return path


def look(case: Case, path: Path, python: Path | None, tell: Callable[[str], None]) -> Localization | str:
    """What localize says of a run, or the line that it ends with."""
    bundle = read_bundle(path)
    if case.profile:
        return localize(path, faults=PROFILES[case.profile].faults_of(bundle), progress=tell)
    os.environ["LANCE_PEER_BITS"] = case.bits
    owed = case.bundle in BUNDLES and bundle.dtype == "float32" and not bundle.task.startswith("x2t")
    try:
        return localize(path, port_loader(ADAPTER, python), progress=tell, attribute=owed)
    except ParityError as error:
        if case.name != I2V:
            raise
        return str(error)


def departures(told: dict[str, Localization | str]) -> Iterator[tuple[str, str, str, str, bool]]:
    """Each departure of the runs that were made: where it is told, as what, what that removes, whether it is named."""
    for departure, run, words in DEPARTURES:
        if (one := told.get(run)) is None:
            continue
        explained = [f.explanations[0] for f in getattr(one, "findings", ()) if f.explained]
        why = next((each for each in explained if each.name.startswith(words)), None)
        if why is not None:
            yield cell(departure), run, cell(why.name), percent(why.residual_removed), why.residual_removed >= LEAST
        else:
            beside = one if isinstance(one, str) else one.remark
            yield cell(departure), run, words if words in beside else "–", "–", words in beside


def findings(found: dict[str, Localization]) -> str:
    """All findings as Markdown, and what is left with them mended."""
    rows, notes = [], []
    for name, one in found.items():
        for number, finding in enumerate(one.findings, 1):
            why = finding.explanations[0] if finding.explained else None
            said = (cell(why.name), percent(why.residual_removed)) if why else ("–", "–")
            rows.append((name, f"`{finding.component}`", *said, *parts_of(one.attribution, number)))
        if one.attribution is not None:
            left = ", ".join(f"{result} {error:.2g}" for result, error in one.attribution.left.items())
            notes.append(f"{name}: {one.attribution.sentence()} (relative error left: {left}).")
    heads = ("run", "finding", "explanation", "removes", "of the latent", "of the pixels")
    return tables.table(heads, rows) + "".join(f"\n{note}\n" for note in notes)


def cell(text: str) -> str:
    """Text within a table."""
    return text.replace("|", "\\|")


def parts_of(attribution: Attribution | None, number: int) -> list[str]:
    """The parts of the latent's and the pixels' error that a finding makes."""
    for worth in attribution.worths if attribution else ():
        if number in worth.numbers:
            before = attribution.before
            return [percent(worth.share[n] / before[n]) if before.get(n) else "–" for n in ("latent", "pixels")]
    return ["–", "–"]


if __name__ == "__main__":
    typer.run(main)
