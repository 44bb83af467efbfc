"""The command of lance-parity that compares models larger than the memory, layer by layer."""

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parity.cli.errors import one_line_errors
from parity.cli.results import IMPL_HELP, FormatOption, OutputOption, PythonOption, check_outputs, finish

PROMPT = "a small red bird flies over the river"


class Numerics(StrEnum):
    """Policies that can be streamed."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command(epilog="Exit status: 0 agrees, 1 diverges, 2 inconclusive or unusable.")(stream)


def stream(
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder in the official layout.", show_default="the one beside --against"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="t2i, t2v or x2t_image.", show_default=False)] = None,
    numerics: Annotated[Numerics, typer.Option(help="Policy of both sides.")] = Numerics.BFLOAT16,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to draw.", show_default=PROMPT)] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="What to answer.", show_default=False)] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What the question is about.", show_default=False)
    ] = None,
    latents: Annotated[
        int | None, typer.Option(help="Latents to denoise, in place of a size.", show_default=False)
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16. [default: 768]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16. [default: 768]")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video. [default: 50]")] = None,
    seed: Annotated[int, typer.Option(help="Draws the noise, by NumPy.")] = 42,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="Compare with a bundle's taps, on its request and noise.", show_default=False
        ),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--fault",
            metavar="NAME[@LAYER]",
            help="Break lance_mlx by a fault of the catalogue, or FILE.py:NAME, everywhere or at one layer; may be "
            "given several times.",
            show_default=False,
        ),
    ] = None,
    impl: Annotated[str, typer.Option(metavar="NAME", help=IMPL_HELP)] = "mlx",
    python: PythonOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.", show_default=False)
    ] = None,
    form: FormatOption = None,
    output: OutputOption = None,
) -> None:
    """Compare one step at full depth and width, with the weights of one layer in memory at a time.

    The embeddings, every layer and what follows the last one are read from the checkpoint one after the other, run on
    the reference and on lance_mlx, and let go of: one denoising step with its guidance arms, or the first token of an
    answer. lance_mlx runs on its own rows, and once more with every tap given what is expected before it, so that an
    error shows in the layer that makes it. What rounding alone does is measured in the same pass, by variants of the
    reference. A question's picture is seen by the reference's ViT, which is read whole, for both sides.

    A port of yours, with --against, holds its own weights, all of them, and runs the request from the streamed
    reference's taps in one go; what it does not tell is listed.
    """
    with one_line_errors(), ExitStack() as stack:
        from tqdm import tqdm

        from parity.errors import ParityError
        from parity.lance.faults.layered import load_layered
        from parity.lance.record_options import Options
        from parity.lance.stream.comparison import stream as run
        from parity.lance.stream.given import stream_given
        from parity.lance.stream.plan import plan_against, plan_live, size_of_latents
        from parity.lance.stream.terminal import print_streamed
        from parity.ports.loading import port_loader

        check_outputs(form, output, json_file)
        load = None if impl == "mlx" and python is None else port_loader(impl, python)
        if load and fault:
            raise ParityError(f"faults break lance_mlx, not {impl}: leave --impl out")
        faults = [load_layered(spec) for spec in fault or []]
        if against is not None:
            chosen = {"--prompt": prompt, "--question": question, "--image": image,
                      "--latents": latents, "--width": width, "--height": height}  # fmt: skip
            given = next((name for name, value in chosen.items() if value is not None), None)
            if given:
                raise ParityError(f"the bundle says what is run: leave {given} out")
            plan = stack.enter_context(plan_against(against, checkpoint))
            if task not in (None, plan.request["task"]):
                raise ParityError(f"bundle {against.name} holds a request of {plan.request['task']}, not {task}")
        else:
            if checkpoint is None or task is None:
                raise ParityError("name a --checkpoint and a --task, or a bundle to compare --against")
            if latents is not None:
                if width is not None or height is not None:
                    raise ParityError("--latents makes its own size: leave --width and --height out")
                width, height = size_of_latents(latents, (num_frames or 50) if task == "t2v" else 1)
            if prompt is None and task != "x2t_image":
                prompt = PROMPT
            options = Options(
                prompt=prompt,
                question=question,
                images=tuple(image or ()),
                width=width,
                height=height,
                num_frames=num_frames,
                steps=None if task == "x2t_image" else 1,
                seed=seed,
            )
            plan = plan_live(checkpoint, task, options, numerics.value)
        bar = stack.enter_context(tqdm(unit="part", leave=False, dynamic_ncols=True, disable=None))

        def tell(part: str, number: int, parts: int) -> None:
            bar.total = parts
            bar.update(number - bar.n)
            bar.set_description(part)

        found = stream_given(plan, load, tell) if load else run(plan, faults, tell)
        bar.close()
        finish(found, json_file, form, output, print_streamed)
