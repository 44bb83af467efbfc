"""What `lance-parity record --upstream` does with its options."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.bundle.reading import Bundle, read_bundle
from parity.bundle.store import describe, sizes
from parity.errors import ParityError
from parity.lance.record_options import Options, build_request
from parity.lance.upstream.record import Clone, record_upstream, record_upstream_layout, request_of
from parity.report.terminal import progress_bar
from parity.tensors.sketch_file import WHOLE


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, whatever it is recorded from."""

    task: str
    options: Options
    out: Path
    checkpoint: Path
    entry: str
    dtype: str
    copy_checkpoint: bool
    layout_only: bool
    level: str
    whole: tuple[str, ...]


def record_from_clone(asked: Asked, clone: Path, python: Path | None, inputs_of: Path | None) -> str:
    """Record from a clone and return a line that says what was written, in how much time and memory.

    A doubt about the clone is printed on stderr. Raises ParityError for what cannot be recorded.
    """
    checked = Clone.at(clone, python)
    if asked.layout_only and (asked.level != WHOLE or asked.whole):
        raise ParityError("without weights there are no taps to keep: leave --level and --whole out")
    given = None if inputs_of is None else read_bundle(inputs_of)
    request = build_request(asked.task, asked.options) if given is None else _request_again(asked, given)
    if checked.warning:
        print(f"lance-parity: {checked.warning}", file=sys.stderr)
    out = asked.out
    with progress_bar(1, "bundle") as start:
        progress = start(f"{out.name} {asked.task}")
        if asked.layout_only:
            run = record_upstream_layout(out, checked, asked.checkpoint, request, progress)
            written = f"{out}.npz, {out}.json"
        else:
            how = asked.entry, asked.dtype, asked.copy_checkpoint, given
            run = record_upstream(out, checked, asked.checkpoint, request, *how, progress, asked.level, asked.whole)
            kept = describe(out)
            written = f"{out}: {kept.taps} taps, {kept.dtype}, {kept.entry}, {sizes(kept.size)}"
    missing = f"; stood in for {', '.join(run.stood_in)}" if run.stood_in else ""
    memory = f", peak memory {run.peak / 1e9:.2f} GB" if run.peak else ""
    return f"{written}\nupstream on {run.device}: {run.seconds:.1f} s{memory}{missing}"


def _request_again(asked: Asked, given: Bundle) -> dict[str, Any]:
    """The request of a bundle; raises ParityError where the command line has one too, or another task."""
    named = tuple(name for name in vars(asked.options) if name != "seed")
    option = asked.options.given(named) or ("--seed" if asked.options.seed != Options.seed else None)
    if option:
        raise ParityError(f"{option} means nothing beside --inputs-of, whose bundle has the request: leave it out")
    if given.task != asked.task:
        raise ParityError(f"bundle {given.name} holds a request of {given.task}, not {asked.task}: name its task")
    return request_of(given)
