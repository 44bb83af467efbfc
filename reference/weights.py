"""Official checkpoint layout: strict loading of the transformer and of the VAE decoder.

DIR/Lance_3B and DIR/Lance_3B_Video hold model.safetensors, llm_config.json and the tokenizer; DIR/Wan2.2_VAE.pth the
VAE. Image tasks use Lance_3B, video tasks Lance_3B_Video.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reference.errors import ReferenceError
from reference.numerics import Numerics
from reference.vae import VAE, DecoderPlan

# The position table is recomputed and the ViT serves other tasks.
UNUSED = ("latent_pos_embed.pos_embed", "vit_model.")
# The encoder's parts of the VAE: its own tower and the convolution behind it.
VAE_UNUSED = ("encoder.", "conv1.")
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def variant_folder(checkpoint: Path, variant: str) -> Path:
    """Folder of a variant in a checkpoint; raises ReferenceError when it is not there."""
    folder = Path(checkpoint) / variant
    if not folder.is_dir():
        raise ReferenceError(f"{folder}: not found; {checkpoint} must hold the official layout")
    return folder


def load_transformer(model: nn.Module, path: Path, numerics: Numerics, device: torch.device) -> None:
    """Fill a model built on the meta device from model.safetensors, in the policy's dtype."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = {name for name in file.keys() if not name.startswith(UNUSED)}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            fill(model, shapes, file.get_tensor, path, numerics, device)
    except FileNotFoundError:
        raise ReferenceError(f"{path}: not found; the weights belong there") from None
    except (OSError, SafetensorError) as error:
        raise ReferenceError(f"{path}: not readable as safetensors ({error})") from None


def load_vae(path: Path, numerics: Numerics, device: torch.device) -> VAE:
    """Read Wan2.2_VAE.pth (a state dict, read without running pickled code) and build its decoder."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ReferenceError(f"{path}: not found; the VAE belongs beside the two variants") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReferenceError(f"{path}: not readable as a state dict of tensors ({reason})") from None
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ReferenceError(f"{path}: does not hold a state dict of tensors")
    tensors = {name: value for name, value in stored.items() if not name.startswith(VAE_UNUSED)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    try:
        plan = DecoderPlan.from_shapes(shapes)
    except ReferenceError as error:
        raise ReferenceError(f"{path}: {error}") from None
    with torch.device("meta"):
        vae = VAE(plan, numerics)
    fill(vae, shapes, tensors.__getitem__, path, numerics, device)
    return vae.eval()


def fill(
    model: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    path: Path,
    numerics: Numerics,
    device: torch.device,
) -> None:
    """Give every parameter its tensor; a missing, extra or misshapen tensor is a ReferenceError that names it."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for complaint, names in (
        ("lacks", sorted(wanted.keys() - shapes.keys())),
        ("holds an unexpected", sorted(shapes.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ReferenceError(f"{path}: {complaint} tensor {names[0]}{more}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ReferenceError(f"{path}: tensor {name} has shape {shapes[name]}, the configuration asks for {shape}")
    ready = {name: checked(read(name), name, path).to(device=device, dtype=numerics.torch_dtype) for name in wanted}
    model.load_state_dict(ready, assign=True)
    model.requires_grad_(False)


def checked(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor itself, if weights can look like it; raises ReferenceError for another dtype, NaN and infinity."""
    if tensor.dtype not in STORED_DTYPES:
        raise ReferenceError(f"{path}: tensor {name} is {tensor.dtype}; float32, bfloat16 or float16 is expected")
    if not torch.isfinite(tensor).all():
        raise ReferenceError(f"{path}: tensor {name} holds NaN or infinite values")
    return tensor
