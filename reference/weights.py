"""Official checkpoint layout: strict loading of the transformer, the vision tower and the VAE.

DIR/Lance_3B and DIR/Lance_3B_Video hold model.safetensors, llm_config.json and the tokenizer; DIR/Qwen2.5-VL-ViT
vit.safetensors and its config.json; DIR/Wan2.2_VAE.pth the VAE. Image tasks use Lance_3B, video tasks Lance_3B_Video.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reference.checks import require_file
from reference.errors import ReferenceError
from reference.numerics import Numerics
from reference.vae import VAE
from reference.vae_decoder import DecoderPlan
from reference.vae_encoder import EncoderPlan
from reference.vit import VisionTower

VIT_PREFIX = "vit_model."
# The position table is recomputed; the vision tower is loaded by itself.
POSITION_TABLE = "latent_pos_embed.pos_embed"
ELSEWHERE = (POSITION_TABLE, VIT_PREFIX)
# The encoder's parts of the VAE: its own tower and the convolution behind it.
VAE_ENCODER = ("encoder.", "conv1.")
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def variant_folder(checkpoint: Path, variant: str) -> Path:
    """Folder of a variant in a checkpoint; raises ReferenceError when it is not there."""
    folder = Path(checkpoint) / variant
    if not folder.is_dir():
        raise ReferenceError(f"{folder}: not found; {checkpoint} must hold the official layout")
    return folder


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; raises ReferenceError when it cannot be read."""
    try:
        require_file(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise ReferenceError(f"{path}: not found; the weights belong there") from None
    except (OSError, SafetensorError) as error:
        raise ReferenceError(f"{path}: not readable as safetensors ({error})") from None


def load_transformer(model: nn.Module, path: Path, numerics: Numerics, device: torch.device) -> None:
    """Fill a model built on the meta device from model.safetensors, in the policy's dtype."""
    with opened(path) as file:
        fill(model, _transformer_shapes(file), file.get_tensor, path, numerics, device)


def check_transformer(model: nn.Module, path: Path) -> None:
    """Raise ReferenceError unless model.safetensors holds just the tensors of a model; none is read."""
    with opened(path) as file:
        check_shapes(model, _transformer_shapes(file), path)


def load_part(model: nn.Module, part: str, path: Path, numerics: Numerics, device: torch.device) -> None:
    """Fill one submodule of a model built on the meta device, and read nothing else of model.safetensors."""
    with opened(path) as file:
        below = f"{part}."
        shapes = _transformer_shapes(file)
        own = {name.removeprefix(below): shape for name, shape in shapes.items() if name.startswith(below)}
        fill(model.get_submodule(part), own, lambda name: file.get_tensor(below + name), path, numerics, device)


def _transformer_shapes(file: safe_open) -> dict[str, tuple[int, ...]]:
    names = [name for name in file.keys() if not name.startswith(ELSEWHERE)]
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def load_vit(tower: VisionTower, path: Path, over: Path, numerics: Numerics, device: torch.device) -> None:
    """Fill a tower built on the meta device from vit.safetensors, then from the `vit_model.*` of model.safetensors.

    What the second file holds wins, as it does in bytedance/Lance inference_lance.py:init_from_model_path_if_needed.
    """
    with opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        fill(tower, shapes, file.get_tensor, path, numerics, device)
    with opened(over) as file:
        names = [name.removeprefix(VIT_PREFIX) for name in file.keys() if name.startswith(VIT_PREFIX)]
        if names:
            shapes |= {name: tuple(file.get_slice(VIT_PREFIX + name).get_shape()) for name in names}
            own = tower.state_dict()

            def read(name: str) -> Tensor:
                return file.get_tensor(VIT_PREFIX + name) if name in names else own[name]

            fill(tower, shapes, read, over, numerics, device)
    tower.eval()


def load_vae(path: Path, numerics: Numerics, device: torch.device) -> VAE:
    """Read Wan2.2_VAE.pth and build what it holds.

    A file without any tensor of the encoder makes a VAE that only decodes.
    """
    stored = read_vae(path)
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    try:
        decoder = DecoderPlan.from_shapes(shapes)
        encoder = EncoderPlan.from_shapes(shapes) if any(name.startswith(VAE_ENCODER) for name in shapes) else None
    except ReferenceError as error:
        raise ReferenceError(f"{path}: {error}") from None
    with torch.device("meta"):
        vae = VAE(decoder, numerics, encoder)
    fill(vae, shapes, stored.__getitem__, path, numerics, device)
    return vae.eval()


def read_vae(path: Path) -> dict[str, Tensor]:
    """The tensors of Wan2.2_VAE.pth, a state dict, read without running pickled code; raises ReferenceError."""
    try:
        require_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ReferenceError(f"{path}: not found; the VAE belongs beside the two variants") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReferenceError(f"{path}: not readable as a state dict of tensors ({reason})") from None
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ReferenceError(f"{path}: does not hold a state dict of tensors")
    return stored


def fill(
    model: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    path: Path,
    numerics: Numerics,
    device: torch.device,
) -> None:
    """Give every parameter its tensor; a missing, extra or misshapen tensor is a ReferenceError that names it."""
    wanted = check_shapes(model, shapes, path)
    ready = {name: checked(read(name), name, path).to(device=device, dtype=numerics.torch_dtype) for name in wanted}
    model.load_state_dict(ready, assign=True)
    model.requires_grad_(False)


def check_shapes(model: nn.Module, shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters, by name; raises ReferenceError unless a file holds the same."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for complaint, names in (
        ("lacks", sorted(wanted.keys() - shapes.keys())),
        ("holds an unexpected", sorted(shapes.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ReferenceError(f"{path}: {complaint} tensor {names[0]}{more}: fetch the file again")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ReferenceError(f"{path}: tensor {name} has shape {shapes[name]}, the configuration asks for {shape}")
    return wanted


def checked(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor itself, if weights can look like it; raises ReferenceError for another dtype, NaN and infinity."""
    if tensor.dtype not in STORED_DTYPES:
        raise ReferenceError(f"{path}: tensor {name} is {tensor.dtype}; float32, bfloat16 or float16 is expected")
    if not torch.isfinite(tensor).all():
        raise ReferenceError(f"{path}: tensor {name} holds NaN or infinite values: fetch the file again")
    return tensor
