"""The commands of lance-mlx that write checkpoints."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lance_mlx.checkpoint.convert import convert_vae, prepare
from lance_mlx.checkpoint.hub import fetch, is_repository
from lance_mlx.checkpoint.layouts import check_folder, find_checkpoint, variants_in
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.cli.console import Console, Interrupted, gigabytes
from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Variant, VisualKind


class DType(StrEnum):
    """What weights can be stored in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def register(app: typer.Typer, epilog: str) -> None:
    """Add the commands to an app."""
    app.command(epilog=epilog)(convert)
    app.command("convert-vae", epilog=epilog)(convert_vae_command)


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of a checkpoint in any layout, or OWNER/NAME on the hub.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make.")],
    variant: Annotated[
        VisualKind | None,
        typer.Option(help="Which model to convert where SOURCE holds both.", show_default=False),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of all weights; bfloat16 is the launcher's.")] = DType.BFLOAT16,
    shard_size: Annotated[float, typer.Option(metavar="GB", help="Most gigabytes of a file.")] = 4.0,
    vit_source: Annotated[
        ViTSource, typer.Option(help="Whose ViT is taken where the Lance file and the ViT file both hold one.")
    ] = ViTSource.LANCE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    """Write one model with its VAE and ViT as safetensors for MLX, in bounded memory.

    What is generated from DEST is bit for bit what is generated from SOURCE under the same --numerics. An interrupted
    conversion goes on where it stopped.
    """
    began = time.perf_counter()
    console = Console(quiet)
    checkpoint = find_checkpoint(*_located(source, variant, quiet))
    conversion = prepare(source, checkpoint, destination, dtype.value, round(shard_size * 1e9), vit_source)
    bar = console.bar(total=0, desc="converting", unit="B", unit_scale=True)

    def started(total: int, done: int):
        bar.reset(total)
        bar.update(done)
        return bar.update

    try:
        with bar:
            report = conversion.run(started)
    except KeyboardInterrupt:
        if not conversion.staging.exists():
            raise
        raise Interrupted(
            f"interrupted; finished files are kept in {conversion.staging}: the same command goes on from there"
        ) from None
    files = {entry["converted"]["file"] for entry in report["tensors"].values()}
    size = sum((destination / file).stat().st_size for file in files)
    elapsed = time.perf_counter() - began
    console.say(
        f"{destination}: {report['variant']}, {len(report['tensors'])} tensors, {dtype}, {size / 1e9:.2f} GB in "
        f"{len(files)} file{'s' if len(files) > 1 else ''}, {elapsed:.1f} s, peak memory {gigabytes()}"
    )


def _located(source: str, kind: VisualKind | None, quiet: bool) -> tuple[Path, Variant]:
    """The folder of the source and the variant to convert."""
    if is_repository(source):
        if kind is None:
            raise LanceError("a repository may hold both models: choose one with --variant image or --variant video")
        return fetch(source, Variant.of(kind), quiet), Variant.of(kind)
    path = Path(source)
    check_folder(path)
    held = variants_in(path)
    if kind is None and len(held) > 1:
        raise LanceError(f"{source} holds both models: choose one with --variant image or --variant video")
    return path, held[0] if kind is None else Variant.of(kind)


def convert_vae_command(
    source: Annotated[Path, typer.Argument(help="The official Wan2.2_VAE.pth.")],
    destination: Annotated[
        Path, typer.Argument(help="The .safetensors file to write; generate looks for Wan2.2_VAE.safetensors.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over a file that is there.")] = False,
) -> None:
    """Write the VAE alone as safetensors, unchanged, once its checksums are found right."""
    count = convert_vae(source, destination, overwrite)
    typer.echo(f"{destination}: {count} tensors")
