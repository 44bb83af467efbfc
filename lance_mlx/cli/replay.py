"""What the metadata of a picture or video say of the options that made it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lance_mlx.backend.numerics import policy
from lance_mlx.cli.meaning import EDITING, OPTIONS, means
from lance_mlx.errors import LanceError
from lance_mlx.media.write import read_metadata
from lance_mlx.requests.request import Request, Variant, VisualKind

_DICTATED = "width", "height", "num_frames"
"""What a source may tell, and another source otherwise."""


def options_of(path: Path) -> dict[str, Any]:
    """Values of the parameters of `generate`, by name, that make the same again but for the model.

    The numerics and the variant are among them, and of a rewritten prompt the new one.

    Raises:
        LanceError: the file holds no request that this version can read.
    """
    metadata = read_metadata(path)
    try:
        requests = [Request.from_dict(values) for values in (*metadata.get("earlier", ()), metadata["request"])]
        variant = Variant(metadata["variant"]) if "variant" in metadata else requests[0].variant
        if "numerics" in metadata:
            policy(metadata["numerics"])
        if len(requests) > 1 and requests[0].task not in EDITING:
            raise ValueError(f"'earlier' is for {' and '.join(EDITING)}")
        for name, kind in (("noise", str), ("reencode", bool), ("vae_tiling", int)):
            if not isinstance(metadata.get(name), kind | None):
                raise ValueError(f"'{name}' is {metadata[name]!r}")
        lora = [(str(folder), float(scale)) for folder, scale in metadata.get("lora", ())]
    except (LanceError, KeyError, TypeError, ValueError) as error:
        raise LanceError(f"{path} holds no request that can be replayed ({error})") from None
    first = requests[0]
    values = {OPTIONS.get(name, name): value for name, value in first.to_dict().items()}
    values |= {
        "prompt": [request.prompt for request in requests],
        "seed": [first.seed],
        "image": [visual.path for visual in first.visuals if visual.kind is VisualKind.IMAGE],
        "video": [visual.path for visual in first.visuals if visual.kind is VisualKind.VIDEO],
        "variant": str(variant.kind),
        "numerics": metadata.get("numerics"),
        "vit_source": metadata.get("vit_source"),
        "noise": metadata.get("noise"),
        "reencode": metadata.get("reencode"),
        "vae_tiling": metadata.get("vae_tiling"),
        "lora": [folder for folder, _ in lora],
        "lora_scale": [scale for _, scale in lora],
        "quantize" if isinstance(metadata.get("quantize"), int) else "quant_predicate": metadata.get("quantize"),
    }
    del values["visuals"]
    return {
        name: value
        for name, value in values.items()
        if value is not None and (name not in _DICTATED or means(name, first.task))
    }


def check_sources(file: Path, sources: Mapping[str, Iterable[Path]]) -> None:
    """Raise LanceError for a source of `file`, by the option that would name another, that is no longer there."""
    for option, paths in sources.items():
        for path in paths:
            if not path.exists():
                raise LanceError(f"{option} {path}, named by the metadata of {file}, does not exist: give --{option}")
