"""The VAE's pickled state dict as a safetensors file."""

import os
from pathlib import Path

from lance_mlx.errors import LanceError
from lance_mlx.pth_file import read_pth
from lance_mlx.safetensors_file import write_safetensors


def convert_vae(source: Path, destination: Path) -> int:
    """Write the tensors of a .pth file to a safetensors file, unchanged; returns their number.

    The file is written beside its destination and renamed.
    """
    if destination.suffix != ".safetensors":
        raise LanceError(f"{destination} must end in .safetensors")
    if not destination.parent.is_dir():
        raise LanceError(f"{destination.parent} is not a folder")
    tensors = read_pth(source)
    temporary = destination.with_name(f".{destination.stem}.{os.getpid()}.safetensors")
    try:
        with temporary.open("wb") as file:
            infos = {name: tensor.info for name, tensor in tensors.items()}
            write_safetensors(file, infos, lambda name: tensors[name].stored_blocks(), {"format": "pt"})
        os.replace(temporary, destination)
    except OSError as error:
        raise LanceError(f"{destination} cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(tensors)
