"""Options that several commands have."""

from typing import Annotated

import typer

from lance_mlx.backend.numerics import POLICIES
from lance_mlx.checkpoint.recipe import RECIPES
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.requests.request import Scheduler, VisualKind
from lance_mlx.sampling.batch import MOST_PICTURES

DEFAULT_SIDE = 768
DEFAULT_FRAMES = 50
ModelOption = Annotated[
    str,
    typer.Option(
        help="Folder of an official checkpoint, or of one of its variants; of a converted one; of one by "
        "mlx-community; or any of these on the hub, as OWNER/NAME."
    ),
]
VariantOption = Annotated[
    VisualKind | None,
    typer.Option(
        help="Use the model for images, or the one for videos. [default: the one trained for the task]",
        show_default=False,
    ),
]
ViTSourceOption = Annotated[
    ViTSource, typer.Option(help="Whose ViT is taken where the Lance file and the ViT file both hold one.")
]
NumericsOption = Annotated[
    str, typer.Option(help=f"Where to round: {' or '.join(POLICIES)}; bfloat16 is the launcher's.")
]
BitsOption = Annotated[
    int | None,
    typer.Option(
        "--quantize",
        "-q",
        help="Quantize the weights of both towers' attention and MLP to 3, 4, 5, 6 or 8 bits while they are read.",
        metavar="BITS",
        show_default=False,
    ),
]
PredicateOption = Annotated[
    str | None,
    typer.Option(
        "--quant-predicate",
        help=f"Recipe of what is quantized, and how: {', '.join(RECIPES)}, or a JSON file.",
        metavar="NAME|FILE",
        show_default=False,
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Most images that are made side by side, of one size and one set of options; 1 for one after the other. "
        "[default: as many as that is faster for, on a CPU 8 of 128x128 and 4 of 256x256]",
        metavar="N",
        min=1,
        max=MOST_PICTURES,
        show_default=False,
    ),
]
GuidanceOption = Annotated[float, typer.Option(help="Guidance scale; 1 turns guidance off.")]
GuidanceIntervalOption = Annotated[
    tuple[float, float],
    typer.Option(
        help="Guidance acts while LOW < t <= HIGH. [default: 0.4 1.0]", metavar="LOW HIGH", show_default=False
    ),
]
SchedulerOption = Annotated[
    Scheduler,
    typer.Option(
        help="How to step: euler is upstream's; heun (two passes a step), dpm++2m and unipc are of second order, a "
        "departure from upstream."
    ),
]
AsUpstreamOption = Annotated[
    bool,
    typer.Option(
        "--as-upstream",
        help="Take the stored pixels of images and videos, as upstream does: no EXIF orientation, no colour profile, "
        "no HDR, neither deinterlaced nor stretched to square pixels.",
    ),
]
LowRamOption = Annotated[
    bool,
    typer.Option(
        "--low-ram",
        help="Hold one layer in memory at a time and read the layers anew in every pass: slower, for machines that the "
        "model does not fit into. The result is the same.",
    ),
]
LoRAOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="Folder of an adapter, in mlx-lm's form or peft's, and how strong it is: 1 as it was trained. Several add "
        "up: --lora A 0.8 --lora B.",
        metavar="DIR [SCALE]",
        show_default=False,
    ),
]
LoRAScaleOption = Annotated[list[float] | None, typer.Option("--lora-scale", hidden=True)]
