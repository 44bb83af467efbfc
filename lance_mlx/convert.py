"""The VAE's pickled state dict as safetensors: the one place that needs torch, and only for a .pth file."""

import os
from pathlib import Path

import mlx.core as mx

from lance_mlx.errors import LanceError


def read_pth(path: Path) -> dict[str, mx.array]:
    """Tensors of a pickled PyTorch state dict, as arrays with the same names, shapes and dtypes.

    Only tensors are unpickled (`weights_only=True`); code in the file is refused, not run.

    Raises:
        LanceError: torch is not installed, or the file is not such a state dict.
    """
    try:
        import torch
    except ImportError:
        raise LanceError(
            f"reading {path.name} needs torch: convert it once where torch is installed, with "
            f"`lance-mlx convert-vae {path} {path.with_suffix('.safetensors').name}`, and put the result beside it"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LanceError(f"{path} is missing") from None
    except Exception as error:  # torch raises many kinds for truncated, foreign and hostile files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LanceError(f"{path} is not a readable PyTorch state dict ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise LanceError(f"{path} does not hold a flat dict of tensors")
    dtypes = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}
    arrays = {}
    for name, tensor in state.items():
        if tensor.dtype not in dtypes:
            raise LanceError(f"{path}: tensor '{name}' is {tensor.dtype}; float32, bfloat16 or float16 is expected")
        # Every 16-bit value is exact in float32, which NumPy can carry.
        arrays[name] = mx.array(tensor.float().numpy()).astype(dtypes[tensor.dtype])
    return arrays


def convert_vae(source: Path, destination: Path) -> int:
    """Write the tensors of a .pth file to a safetensors file, unchanged; returns their number.

    The file is written beside its destination and renamed.
    """
    if destination.suffix != ".safetensors":
        raise LanceError(f"{destination} must end in .safetensors")
    if not destination.parent.is_dir():
        raise LanceError(f"{destination.parent} is not a folder")
    arrays = read_pth(source)
    temporary = destination.with_name(f".{destination.stem}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(temporary), arrays)
        os.replace(temporary, destination)
    except (OSError, RuntimeError) as error:
        raise LanceError(f"{destination} cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(arrays)
