"""The commands of lance-mlx that write checkpoints."""

import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lance_mlx.checkpoint.convert import convert_vae, prepare
from lance_mlx.checkpoint.hub import fetch, is_repository
from lance_mlx.checkpoint.layouts import check_folder, find_checkpoint, variants_in
from lance_mlx.checkpoint.recipe import Recipe, recipe_of
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.cli.console import Console, Interrupted, gigabytes
from lance_mlx.cli.options import BitsOption, LoRAOption, LoRAScaleOption, PredicateOption, ViTSourceOption
from lance_mlx.cli.settings import chosen_recipe
from lance_mlx.cli.several import TakesSeeds
from lance_mlx.errors import LanceError
from lance_mlx.files import check_place
from lance_mlx.model.quantized import MODES
from lance_mlx.requests.request import Variant, VisualKind
from lance_mlx.training.adapter_files import read_adapter, write_adapter
from lance_mlx.training.lora import Adapter, added_to

Mode = StrEnum("Mode", {name.upper(): name for name in MODES})


VariantInSource = Annotated[
    VisualKind | None, typer.Option(help="Which model to convert where SOURCE holds both.", show_default=False)
]


class DType(StrEnum):
    """What weights can be stored in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def register(app: typer.Typer, epilog: str) -> None:
    """Add the commands to an app."""
    app.command(epilog=epilog)(convert)
    app.command("convert-vae", epilog=epilog)(convert_vae_command)
    app.command(epilog=epilog, cls=TakesSeeds)(fuse)
    app.command("convert-lora", epilog=epilog)(convert_lora)


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of a checkpoint in any layout, or OWNER/NAME on the hub.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make.")],
    variant: VariantInSource = None,
    dtype: Annotated[DType, typer.Option(help="Of all weights; bfloat16 is the launcher's.")] = DType.BFLOAT16,
    shard_size: Annotated[float, typer.Option(metavar="GB", help="Most gigabytes of a file.")] = 4.0,
    vit_source: ViTSourceOption = ViTSource.LANCE,
    quantize: Annotated[
        bool,
        typer.Option("--quantize", "-q", help="Quantize, by default both towers' attention and MLP to 8 bits."),
    ] = False,
    q_bits: Annotated[int | None, typer.Option(help="Bits of a weight: 3, 4, 5, 6 or 8.", show_default=False)] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128.", show_default=False)
    ] = None,
    q_mode: Annotated[Mode, typer.Option(help="MLX's mode; all but affine have their own bits and groups.")] = (
        Mode.AFFINE
    ),
    quant_predicate: PredicateOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-Q", help="Show errors only.")] = False,
) -> None:
    """Write one model with its VAE and ViT as safetensors for MLX, in bounded memory.

    What is generated from DEST is bit for bit what is generated from SOURCE under the same --numerics, unless -q
    quantizes it. A SOURCE that is quantized is dequantized. An interrupted conversion goes on where it stopped.
    """
    recipe = None
    if quantize:
        recipe = recipe_of(q_bits, quant_predicate, q_group_size, q_mode.value)
    elif (q_bits, q_group_size, q_mode, quant_predicate) != (None, None, Mode.AFFINE, None):
        raise LanceError("--q-bits, --q-group-size, --q-mode and --quant-predicate say how to quantize: add -q")
    _convert(source, destination, variant, dtype, shard_size, vit_source, recipe, (), quiet)


def fuse(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of a checkpoint in any layout, or OWNER/NAME on the hub.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make.")],
    lora: LoRAOption = None,
    lora_scale: LoRAScaleOption = None,
    variant: VariantInSource = None,
    dtype: Annotated[DType, typer.Option(help="Of all weights; bfloat16 is the launcher's.")] = DType.BFLOAT16,
    shard_size: Annotated[float, typer.Option(metavar="GB", help="Most gigabytes of a file.")] = 4.0,
    vit_source: ViTSourceOption = ViTSource.LANCE,
    quantize: BitsOption = None,
    quant_predicate: PredicateOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-Q", help="Show errors only.")] = False,
) -> None:
    """Write one model with adapters added to its weights, as convert does: generate needs no --lora then.

    The sums are rounded once. A SOURCE that is quantized is dequantized first; -q quantizes what comes of one that is
    not.
    """
    if not lora:
        raise LanceError("give the folder of an adapter with --lora")
    adapters = [read_adapter(Path(path)).scaled(scale) for path, scale in zip(lora, lora_scale, strict=True)]
    recipe = chosen_recipe(quantize, quant_predicate)
    _convert(source, destination, variant, dtype, shard_size, vit_source, recipe, adapters, quiet)


def convert_lora(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of an adapter, in mlx-lm's form or peft's.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make.")],
    peft: Annotated[bool, typer.Option("--peft", help="Write peft's form and not mlx-lm's.")] = False,
) -> None:
    """Write an adapter in the other form."""
    adapter = read_adapter(source)
    if destination.exists():
        raise LanceError(f"{destination} exists already: choose another folder, or remove it")
    check_place(destination)
    write_adapter(destination, adapter.pairs, peft)
    typer.echo(f"{destination}: adapters of {len(adapter.pairs)} layers")


def _convert(
    source: str,
    destination: Path,
    variant: VisualKind | None,
    dtype: DType,
    shard_size: float,
    vit_source: ViTSource,
    recipe: Recipe | None,
    adapters: Sequence[Adapter],
    quiet: bool,
) -> None:
    began = time.perf_counter()
    console = Console(quiet)
    checkpoint = find_checkpoint(*_located(source, variant, quiet))
    added = added_to(checkpoint, adapters)
    size = round(shard_size * 1e9)
    conversion = prepare(source, checkpoint, destination, dtype.value, size, vit_source, recipe, added)
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
    kind = dtype.value + (f", adapters of {len(added[0])} layers added" if adapters else "")
    if recipe is not None:
        packed = [entry["converted"] for entry in report["tensors"].values() if "bits" in entry["converted"]]
        kind += f", {len(packed)} weights quantized"
        for path in report["not_in_groups"]:
            console.note(f"{path} is left as it is: its rows do not part into groups")
    console.say(
        f"{destination}: {report['variant']}, {len(report['tensors'])} tensors, {kind}, {size / 1e9:.2f} GB in "
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
    """Write the VAE alone as safetensors, its tensors unchanged, once its checksums are found right."""
    count = convert_vae(source, destination, overwrite)
    typer.echo(f"{destination}: {count} tensors")
