"""The commands of lance-parity that record, list, verify and compare."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parity.cli.errors import one_line_errors
from parity.cli.results import FormatOption, OutputOption, PythonOption, QuantizeOption, check_outputs, deliver


class Weights(StrEnum):
    """What of a checkpoint a recording reads."""

    ALL = "all"
    NONE = "none"


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    usable = "2 bad input: one line says what and how to mend it."
    app.command(epilog=f"Exit status: 0 written, {usable}")(record)
    app.command(epilog=f"Exit status: 0 all can be used, {usable}")(oracles)
    app.command(epilog="Exit status: 0 everything is as it must be, 1 something is not, 2 unusable.")(verify)
    app.command(epilog="Exit status: 0 agree, 1 diverge, 2 unusable, inconclusive, or nothing was compared.")(compare)


def record(
    task: Annotated[
        str,
        typer.Argument(
            help="t2i, t2v, i2v, image_edit, video_edit, idip (or subject), image_idip, video_idip, x2t_image or "
            "x2t_video."
        ),
    ],
    checkpoint: Annotated[Path, typer.Option(metavar="DIR", help="Folder in the official checkpoint layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="Folder of the new bundle.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to draw or to change.")] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="What to answer.")] = None,
    instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt of a question. [default: upstream's]")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Image to start from, or several.", show_default=False)
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Video to start from, or several.", show_default=False)
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16. [default: 768]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16. [default: 768]")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video. [default: 50]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [default: 30]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns guidance off. [default: 4]")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Guidance acts while LOW < t <= HIGH. [default: 0.4 1]"),
    ] = None,
    guidance_renorm: Annotated[
        str | None, typer.Option(metavar="NAME", help="global, channel or none. [default: global]")
    ] = None,
    timestep_shift: Annotated[float | None, typer.Option(help="Shift towards noise. [default: 3.5]")] = None,
    text_template: Annotated[
        bool | None,
        typer.Option("--text-template/--no-text-template", help="Wrap the prompt in the template. [default: do]"),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Upstream's pair of sizes of visuals. [default: image_768res, video_480p]"),
    ] = None,
    vae_resolution: Annotated[
        int | None, typer.Option(help="About this many pixels squared for the VAE, in place of --resolution's.")
    ] = None,
    vit_resolution: Annotated[
        int | None, typer.Option(help="About this many pixels squared for the ViT, in place of --resolution's.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer. [default: 256]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 42,
    numerics: Annotated[str, typer.Option(metavar="NAME", help="float32 or bfloat16.")] = "bfloat16",
    entry: Annotated[
        str, typer.Option(metavar="NAME", help="Which of upstream's sampling functions: kv_cache or full_sequence.")
    ] = "kv_cache",
    copy_checkpoint: Annotated[
        bool, typer.Option("--copy-checkpoint", help="Copy the checkpoint beside the bundle; else it is linked there.")
    ] = False,
    quantize: QuantizeOption = None,
    upstream: Annotated[
        Path | None,
        typer.Option(metavar="CLONE", help="A clone of bytedance/Lance to run in place of the reference."),
    ] = None,
    upstream_python: Annotated[
        Path | None,
        typer.Option(metavar="PYTHON", help="The Python of the clone's own environment. [default: this one]"),
    ] = None,
    inputs_of: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="With --upstream: run this bundle's request again, from its noise and pixels."
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(help="With --upstream none keeps the sequence alone, BUNDLE.npz and .json, and reads no weights."),
    ] = Weights.ALL,
    hold: Annotated[
        bool,
        typer.Option("--hold/--no-hold", help="With --upstream: hold the bundle against the reference afterwards."),
    ] = True,
    level: Annotated[
        str,
        typer.Option(metavar="NAME", help="whole: every tap as it is; sketch: at most 16 kB of each that is larger."),
    ] = "whole",
    whole: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="At level sketch, keep taps or components of this name whole, such as 'layers.?'; may be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a request on the PyTorch reference, or on a clone of upstream, and keep what it computes as a bundle.

    The bundle has the form of those captured from upstream, and every other command takes it. Its checkpoint has to lie
    beside it; images and videos are copied into media/ there. Noise is drawn by PyTorch from the seed. The bundle
    appears under its name only when it is whole.

    Of a clone nothing is changed: its launcher runs in a process of its own, on the GPU where there is one.
    """
    with one_line_errors():
        from parity.bundle.store import describe, sizes
        from parity.errors import ParityError
        from parity.lance import record as recorder
        from parity.lance.record_options import Options, build_request
        from parity.report.terminal import progress_bar

        options = Options(
            prompt=prompt,
            question=question,
            instruction=instruction,
            images=tuple(image or ()),
            videos=tuple(video or ()),
            width=width,
            height=height,
            num_frames=num_frames,
            steps=steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_renorm=guidance_renorm,
            timestep_shift=timestep_shift,
            text_template=text_template,
            resolution=resolution,
            vae_resolution=vae_resolution,
            vit_resolution=vit_resolution,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        if upstream is not None:
            if quantize is not None:
                raise ParityError("a clone of upstream runs no quantized weights: leave --quantize or --upstream out")
            from parity.lance.upstream.command import Asked, record_from_clone

            how = entry, numerics, copy_checkpoint, weights is Weights.NONE, level, tuple(whole or ())
            asked = Asked(task, options, out, checkpoint, *how)
            print(record_from_clone(asked, upstream, upstream_python, inputs_of))
            if hold and weights is not Weights.NONE:
                _hold_against_reference(out)
            return
        refuse_without_upstream(upstream_python, inputs_of, weights)
        request = build_request(task, options)
        with progress_bar(1, "bundle") as start:
            tell, patterns = start(f"{out.name} {task}"), tuple(whole or ())
            if quantize is not None:
                checkpoint = recorder.quantized_beside(out, checkpoint, request, entry, numerics, quantize)
            recorder.record(out, checkpoint, request, entry, numerics, copy_checkpoint, tell, level, patterns)
        kept = describe(out)
        print(f"{out}: {kept.taps} taps, {kept.dtype}, {kept.entry}, {sizes(kept.size)}")


def _hold_against_reference(bundle: Path) -> None:
    """Say whether the reference computes what upstream did; ends the command with status 1 where it does not."""
    from parity.oracle.floors_file import judge_bundle
    from parity.report.terminal import progress_bar

    with progress_bar(1, "bundle") as start:
        judgement = judge_bundle(bundle, start(bundle.name))
    print(judgement.sentence() or "the reference computes the same, but for rounding")
    if not judgement.agree:
        raise typer.Exit(1)


def refuse_without_upstream(python: Path | None, inputs_of: Path | None, weights: Weights) -> None:
    """Raise ParityError for an option that only a clone of upstream has a use for."""
    from parity.errors import ParityError

    given = (("--upstream-python", python), ("--inputs-of", inputs_of), ("--weights none", weights is Weights.NONE))
    for option, value in given:
        if value:
            raise ParityError(f"{option} needs --upstream: name a clone of bytedance/Lance there")


def oracles(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders of bundles, or single bundles.", show_default="oracles/")
    ] = None,
) -> None:
    """List bundles: what each holds, where it comes from, and whether its files are what they were."""
    from parity.cli.errors import UNUSABLE_STATUS

    with one_line_errors():
        from parity.bundle.store import list_bundles
        from parity.report.terminal_store import print_bundles

        bundles = list_bundles(folders or [Path("oracles")])
        print_bundles(bundles)
        raise typer.Exit(UNUSABLE_STATUS if any(bundle.problem for bundle in bundles) else 0)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of bundles, or a single bundle.")],
) -> None:
    """Verify what is kept: checksums, formats, values, and all that can be derived anew.

    Where the checkpoint's weights are at hand, the reference has to compute what the bundle holds, up to what
    rounding does. Derived without weights, by the reference: the sequence and all position ids from the request, the
    schedule and which steps are guided, RoPE from queries and keys, the residual stream, sampled latents, every state
    from the state and velocities before it, the range of pixels, and where this project recorded the bundle what the
    seed draws.
    """
    with one_line_errors():
        from parity.oracle import verify as verifier
        from parity.report.terminal import progress_bar
        from parity.report.terminal_store import print_verified

        with progress_bar(1, "bundle") as start:
            results = verifier.verify(folder, start)
        print_verified(results)
        raise typer.Exit(verifier.exit_status(results))


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="What is expected.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.")],
    within: Annotated[
        float | None, typer.Option(help="Largest relative L2 error of a tap.", show_default=False)
    ] = None,
    any_dtype: Annotated[
        bool,
        typer.Option(
            "--any-dtype", help="Let float32 stand beside bfloat16, as it may where runs name their numerics."
        ),
    ] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Let B lack taps that A has.")] = False,
    python: PythonOption = None,
    form: FormatOption = None,
    output: OutputOption = None,
) -> None:
    """Compare any two runs, tap by tap.

    A and B are each one of:

    - `BUNDLE`: what the bundle holds;
    - `BUNDLE@mlx`, `BUNDLE@reference`: its request replayed, under the bundle's numerics;
    - `BUNDLE@mlx:float32`, `BUNDLE@mlx:bfloat16`, ...: under these;
    - `FILE.safetensors`, or the folder that `check --dump` wrote.

    For B, `@mlx` alone is about A's bundle; `@FILE.py:NAME` is a port of yours. A bundle and its replay under its own
    numerics are judged as `check` does, and so are a bundle and a file. Any other two agree where no tap is farther
    than `--within`, or where every bit is equal; else the comparison is inconclusive, since nothing says how far
    rounding may take them apart.

    Example: `lance-parity compare oracles/t2i-fp32-kv@mlx:float32 @mlx:bfloat16 --within 0.05`
    """
    with one_line_errors():
        from parity.comparison.compare import compare_runs, unusable
        from parity.comparison.verdict import AGREE, DIVERGE
        from parity.errors import ParityError
        from parity.report.runner import limit_threads
        from parity.report.terminal import progress_bar
        from parity.report.terminal_store import print_comparison

        limit_threads()
        check_outputs(form, output)
        try:
            with progress_bar(2, "run") as start:
                compared = compare_runs(a, b, within, False if any_dtype else None, allow_missing, start, python)
        except ParityError as error:
            deliver(unusable(a, b, str(error)), form, output)
            raise
        if not deliver(compared, form, output):
            print_comparison(compared)
        raise typer.Exit({AGREE: 0, DIVERGE: 1}.get(compared.verdict, 2))
