"""Small stand-ins for packages that upstream imports and this Python lacks; where the real one is there, it is used.

What upstream's inference calls of them computes the same; everything else of them is a name that raises when used.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]


class InterpolationMode(Enum):
    """Filters of resizing, by torchvision's names."""

    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


def resize(img: Image.Image, size: Size, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> Image.Image:
    """Resize a picture to (height, width) in pixels."""
    return img.resize((size[1], size[0]), interpolation.value)


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as float32 [3, height, width] in [0, 1]."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, -1).permute(2, 0, 1).contiguous().float() / 255


def center_crop(img: Tensor, output_size: Size) -> Tensor:
    """Cut [..., height, width] down to its middle."""
    height, width = output_size
    top, left = (round((have - want) / 2.0) for have, want in zip(img.shape[-2:], output_size, strict=True))
    return img[..., top : top + height, left : left + width]


class Compose:
    """One transformation after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


class Normalize:
    """Subtract means and divide by deviations, for all channels or one by one, of [..., channel, height, width]."""

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        self.mean, self.std = (torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (mean, std))

    def __call__(self, value: Tensor) -> Tensor:
        return (value - self.mean) / self.std


class RandomResizedCrop:
    """The largest crop of one aspect ratio, resized; drawn where it fits in several places, else the middle.

    Of torchvision's random ranges upstream leaves one value each, `scale` (1, 1) and one ratio.
    """

    def __init__(self, size: Size, scale: Size, ratio: tuple[float, float], interpolation: InterpolationMode) -> None:
        if tuple(scale) != (1, 1) or ratio[0] != ratio[1]:
            raise NotImplementedError("the stand-in for torchvision knows one scale and one ratio: install torchvision")
        self.size, self.ratio, self.interpolation = size, float(ratio[0]), interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top, width, height = self.box(*image.size)
        return resize(image.crop((left, top, left + width, top + height)), self.size, self.interpolation)

    def box(self, have_width: int, have_height: int) -> tuple[int, int, int, int]:
        """Return left, top, width and height of the crop in pixels."""
        area, logarithm = have_width * have_height, torch.log(torch.tensor(self.ratio)).item()
        for _ in range(10):
            target = area * torch.empty(1).uniform_(1, 1).item()
            aspect = torch.exp(torch.empty(1).uniform_(logarithm, logarithm)).item()
            width, height = round((target * aspect) ** 0.5), round((target / aspect) ** 0.5)
            if 0 < width <= have_width and 0 < height <= have_height:
                top = torch.randint(0, have_height - height + 1, (1,)).item()
                return torch.randint(0, have_width - width + 1, (1,)).item(), top, width, height
        width, height = have_width, have_height
        if have_width / have_height < self.ratio:
            height = round(width / self.ratio)
        elif have_width / have_height > self.ratio:
            width = round(height * self.ratio)
        return (have_width - width) // 2, (have_height - height) // 2, width, height


class VideoReader:
    """The frames of a video by number, decoded by PyAV in place of decord."""

    def __init__(self, uri: str, ctx: object = None) -> None:
        import av

        self._open = lambda: av.open(uri)
        with self._open() as container:
            stream = container.streams.video[0]
            self._rate = float(stream.average_rate)
            self._count = sum(1 for _ in container.decode(stream))

    def __len__(self) -> int:
        return self._count

    def get_avg_fps(self) -> float:
        """Frames a second."""
        return self._rate

    def get_batch(self, indices: Sequence[int]) -> "Batch":
        """The frames of some numbers."""
        wanted = set(indices)
        with self._open() as container:
            numbered = enumerate(container.decode(video=0))
            frames = {number: frame.to_ndarray(format="rgb24") for number, frame in numbered if number in wanted}
        return Batch(frames[index] for index in indices)


class Batch(list):
    """Frames, each uint8 [height, width, 3]."""

    def asnumpy(self) -> list:
        """The frames as they are."""
        return list(self)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    """flash_attn_varlen_func for one sequence: [n, heads, head_dim] of queries, fewer heads of keys and values.

    A causal mask ends at the last key, where the new queries do.
    """
    if len(cu_seqlens_q) != 2:
        raise NotImplementedError("the stand-in for flash_attn knows one sequence: install flash_attn")
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None
    if causal:
        n, m = q.shape[0], k.shape[0]
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    found = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return found[0].transpose(0, 1)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any = None, enable_gqa: bool = False
) -> Tensor:
    """flex_attention for a mask, without its compiler: [1, heads, n, head_dim], fewer heads of keys and values."""
    n = torch.arange(query.shape[2], device=query.device)
    batch = head = torch.zeros((), dtype=n.dtype, device=n.device)
    mask = block_mask.mask_mod(batch, head, n[:, None], n[None, :])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)


class Absent(ModuleType):
    """A module of which some names are given; any other is a class that says what to install when it is used."""

    def __init__(self, name: str, **given: object) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None, is_package=True), []
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(self: object, *args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"{package} is not installed, and its {name} is needed")

        package = self.__name__
        return type(name, (), {"__init__": refuse})


def _torchvision() -> dict[str, ModuleType]:
    functional = Absent(
        "torchvision.transforms.functional",
        **{"InterpolationMode": InterpolationMode, "to_tensor": to_tensor, "resize": resize},
        center_crop=center_crop,
    )
    transforms = Absent(
        "torchvision.transforms",
        **{"functional": functional, "InterpolationMode": InterpolationMode, "Compose": Compose},
        **{"Normalize": Normalize, "RandomResizedCrop": RandomResizedCrop},
    )
    package = Absent("torchvision", transforms=transforms)
    return {module.__name__: module for module in (package, transforms, functional)}


STAND_INS: dict[str, Callable[[], dict[str, ModuleType]]] = {
    "torchvision": _torchvision,
    "flash_attn": lambda: {"flash_attn": Absent("flash_attn", flash_attn_varlen_func=attention)},
    "decord": lambda: {"decord": Absent("decord", VideoReader=VideoReader, cpu=lambda number=0: None)},
    "cv2": lambda: {"cv2": Absent("cv2")},
    "imageio": lambda: {"imageio": Absent("imageio")},
}
"""Package -> what makes the modules that stand in for it."""


def install() -> list[str]:
    """Put stand-ins into sys.modules for what cannot be imported; return the names of those packages."""
    missing = []
    for name, make in STAND_INS.items():
        try:
            import_module(name)
        except Exception:  # a package that is there but broken raises anything
            for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
                with suppress(KeyError):
                    del sys.modules[loaded]
            sys.modules.update(make())
            missing.append(name)
    return missing
