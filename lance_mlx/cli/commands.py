"""What `lance-mlx generate` does with questions, and with a request file."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lance_mlx.api import Generated, LanceModel
from lance_mlx.cli.console import Console, Interrupted, Stages, gigabytes
from lance_mlx.cli.drawing import Drawing, draw_all, prepare_drawings
from lance_mlx.cli.settings import Settings
from lance_mlx.cli.sharing import Sharing
from lance_mlx.media.write import check_text_output, save_text
from lance_mlx.requests.files import Item, RequestsFile, naming_entry
from lance_mlx.requests.request import Question, Request, Task
from lance_mlx.requests.results import ResultsFolder
from lance_mlx.requests.rewriting import Rewriter


def answer(
    model: LanceModel, questions: Sequence[Question], outputs: Sequence[Path | None], overwrite: bool, console: Console
) -> None:
    """Answer questions: each text goes to stdout as it comes, and to its output file if there is one.

    Raises:
        Interrupted: the user stopped the run after the first file.
    """
    paths = [check_text_output(output, overwrite) if output else None for output in outputs]
    within_a_line, written = False, 0

    def show(piece: str) -> None:
        nonlocal within_a_line
        within_a_line = not piece.endswith("\n")
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        with Stages(console) as stages:
            for question, path in zip(questions, paths, strict=True):
                started = time.perf_counter()
                shown = path is None or not console.quiet
                answered = model.answer(question, show if shown else None, stages.progress)
                if shown:
                    show("\n")
                if path is not None:
                    save_text(path, f"{answered.text}\n")
                    written += 1
                count, elapsed = len(answered.tokens), time.perf_counter() - started
                console.note(
                    f"{count} token{'s' if count > 1 else ''}, {model.numerics.name}, {answered.seconds_reading:.1f} s "
                    f"to read, {answered.seconds_a_token:.3f} s a token, {elapsed:.1f} s in all, peak memory "
                    f"{gigabytes()}"
                )
    except KeyboardInterrupt:
        if within_a_line:
            show("\n")
        if written:
            raise Interrupted(f"interrupted; {written} of {len(paths)} are written") from None
        raise


def work_through(
    model: LanceModel,
    requests: RequestsFile,
    settings: Settings,
    folder: Path,
    overwrite: bool,
    batch_size: int | None,
    rewriter: Rewriter | None,
    console: Console,
    sharing: Sharing,
) -> None:
    """Make what the items of a request file ask for and is not in the folder yet.

    Args:
        overwrite: make anew what is there and was made from another request.
        batch_size: most images that are made side by side; None for as many as pay.

    Raises:
        LanceError: an item cannot be made, or was made from another request; those before it are kept.
        Interrupted: the user stopped the run.
    """
    asked: dict[str, Request | Question] = {}
    for item in requests.items:
        with naming_entry(requests.path, item.key):
            asked[item.key] = _ask(settings, requests.task, item)
    made_by = model.made_by(next(iter(asked.values())))
    results = ResultsFolder(folder, requests, asked, made_by, rewriter is not None, overwrite)
    wanting = {item.key for item in results.pending}
    wanting = sharing.ranks.wanting_everywhere([item.key in wanting for item in requests.items])
    missing = [item for item, wanted in zip(requests.items, wanting, strict=True) if wanted]
    pending, done = sharing.items(missing), len(requests.items) - len(missing)

    def drawings() -> Iterator[Drawing]:
        for item in pending:
            with naming_entry(requests.path, item.key):
                prepared = prepare_drawings([asked[item.key]], partial(results.paths, item), overwrite=True)
                yield from map(sharing.drawing, prepared)

    with going_on(console, folder, str(requests.task), done + len(pending), done) as advance:
        if not requests.task.answers:

            def written(drawing: Drawing, generated: Generated) -> None:
                if drawing.path is not None:
                    results.drawn(drawing.path, generated.request.prompt)
                advance()

            draw_all(model, drawings(), batch_size, rewriter, console, written)
        else:
            # By one generator, so that questions on one visual share its reading.
            answers = model.answer_all(asked[item.key] for item in pending)
            for item in pending:
                with naming_entry(requests.path, item.key):
                    answered = next(answers)
                results.answered(item, answered.raw_text)
                console.say(f"{item.key}: {' '.join(answered.text.split())}")
                advance()
    if sharing.writes:
        results.finish()


@contextmanager
def going_on(console: Console, folder: Path, what: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar over items that go to a folder, `done` of which are there; gives a function that counts one more.

    Raises:
        Interrupted: the user stopped the run.
    """
    if done:
        console.say(f"{folder}: {done} of {total} are there already")
    bar = console.bar(total=total, initial=done, desc=what, unit="item")

    def advance() -> None:
        nonlocal done
        done += 1
        bar.update()

    try:
        with bar:
            yield advance
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {done} of {total} are in {folder}: the same command goes on from there"
        ) from None


def _ask(settings: Settings, task: Task, item: Item) -> Request | Question:
    if task.answers:
        return settings.question(task, item.text, item.visuals, item.instruction, item.answer)
    return settings.request(task, item.text, item.visuals, item.vision_type)
