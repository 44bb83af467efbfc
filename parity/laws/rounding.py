"""Values rounded to fewer bits: to floating point formats, and to the grids of quantization."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

Rounded = Callable[[np.ndarray], np.ndarray]

# Bits of mantissa, least and largest exponent, largest value.
FORMATS = {
    "bfloat16": (7, -126, 3.39e38),
    "float16": (10, -14, 65504.0),
    "TF32": (10, -126, 3.4e38),
    "float8_e4m3": (3, -6, 448.0),
    "float8_e5m2": (2, -14, 57344.0),
    "float4_e2m1": (1, 0, 6.0),
}
GROUPS = (16, 32, 64, 128)


def to_bits(array: np.ndarray, kept: int, nearest: bool = True) -> np.ndarray:
    """Float32 values of which `kept` bits of the mantissa are kept, rounded to the nearest even or cut off; float64."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    dropped = np.uint64(23 - kept)
    if nearest:
        bits = bits + (np.uint64(1) << (dropped - np.uint64(1))) - np.uint64(1) + ((bits >> dropped) & np.uint64(1))
    return ((bits >> dropped) << dropped).astype(np.uint32).view(np.float32).astype(np.float64).reshape(np.shape(array))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Values rounded to bfloat16, as float32."""
    return to_bits(x, 7).astype(np.float32)


def to_format(x: np.ndarray, name: str) -> np.ndarray:
    """Values rounded to nearest even in a floating point format, as float64."""
    if name in ("bfloat16", "TF32"):
        return to_bits(x, FORMATS[name][0])
    if name == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float64)
    bits, least, most = FORMATS[name]
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), least)
    step = 2.0 ** (exponent - bits)
    return np.clip(np.round(x / step) * step, -most, most)


DTYPES: dict[str, Rounded] = {
    **{name: partial(to_format, name=name) for name in ("bfloat16", "float16", "TF32")},
    "bfloat16 by cutting off": partial(to_bits, kept=7, nearest=False),
}
"""What rounds to the dtypes that results are computed in, by their names."""


def rounded_to(dtype: str, x: np.ndarray) -> np.ndarray:
    """Values, real or complex, as float32 or one of DTYPES has them; float64."""
    if np.iscomplexobj(x):
        return rounded_to(dtype, x.real) + 1j * rounded_to(dtype, x.imag)
    x = np.asarray(x, np.float32)
    return x.astype(np.float64) if dtype == "float32" else DTYPES[dtype](x)


def formats() -> Iterator[tuple[str, float, Rounded]]:
    """Every format by itself: words, size, what rounds."""
    for name in ("float8_e4m3", "float8_e5m2"):
        yield f"is rounded to {name}", 1, partial(to_format, name=name)
    for name, rounded in DTYPES.items():
        yield f"is rounded to {name}", 1, rounded


def grids(width: int) -> Iterator[tuple[str, float, Rounded]]:
    """The usual ways to quantize a matrix [..., width]: words, size, what quantizes and goes back."""
    spans: list[tuple[str, int | None]] = [("", None), (" row by row", width)]
    spans += [(f" in groups of {group}", group) for group in GROUPS if width % group == 0 and group < width]
    for words, group in spans:
        for bits in (8, 6, 5, 4, 3, 2):
            for kind, (more, size) in _KINDS.items():
                if bits > 2 or kind is not _symmetric:
                    yield f"is quantized to {bits} bits{words}{more}", size, _grouped(kind, bits, group)
        for name in ("float8_e4m3", "float8_e5m2"):
            yield f"is rounded to {name}{words}, scaled", 2, _grouped(_scaled_format, name, group)
    if width % 32 == 0:
        yield "is quantized to mxfp4", 2, _grouped(_micro, "float4_e2m1", 32)
        yield "is quantized to mxfp8", 2, _grouped(_micro, "float8_e4m3", 32)
    if width % 16 == 0:
        yield "is quantized to nvfp4", 2, _grouped(_scaled_format, "float4_e2m1", 16)


def by_rows(words: str) -> bool:
    """Whether a way to quantize, by its words, does with each row what it does without the others."""
    return any(part in words for part in (" row by row", " in groups of ", "fp4", "mxfp8", "is rounded to")) and (
        "scaled" not in words or " row by row" in words or " in groups of " in words
    )


def _grouped(kind: Callable, how: int | str, group: int | None) -> Rounded:
    def rounded(x: np.ndarray) -> np.ndarray:
        # What is quantized is float32: where that rounds a code up or down decides.
        shape = (1, -1) if group is None else (-1, group)
        return kind(np.asarray(x, np.float32).reshape(shape), how).reshape(x.shape).astype(np.float64)

    return rounded


def _ends(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.min(-1, keepdims=True), x.max(-1, keepdims=True)


def _symmetric(x: np.ndarray, bits: int) -> np.ndarray:
    step = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / (2 ** (bits - 1) - 1)
    return np.round(x / step) * step


def _wide(x: np.ndarray, bits: int) -> np.ndarray:
    """The most negative code is used too."""
    step = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / 2 ** (bits - 1)
    return np.clip(np.round(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def _affine(x: np.ndarray, bits: int) -> np.ndarray:
    low, high = _ends(x)
    step = np.maximum(high - low, 1e-30) / (2**bits - 1)
    return np.round((x - low) / step) * step + low


def _towards_zero(x: np.ndarray, bits: int) -> np.ndarray:
    """As MLX does; of what is bfloat16 steps are so too."""
    codes, step, offset = codes_towards_zero(x, bits)
    if np.array_equal(bfloat16(x), x):
        return bfloat16(bfloat16(codes * bfloat16(step)) + bfloat16(offset))
    return codes * step + offset


def _wide_steps(x: np.ndarray, bits: int) -> np.ndarray:
    """As MLX does of float32, whatever it is of."""
    codes, step, offset = codes_towards_zero(x, bits)
    return codes * step + offset


def codes_towards_zero(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of groups float32 [n, group], and each group's step and offset [n, 1]; the end that is farther from 0 is
    met exactly, and so is 0."""
    low, high = _ends(x)
    step = np.maximum((high - low) / (2**bits - 1), 1e-7)
    from_low = np.abs(low) > np.abs(high)
    outer, step = np.where(from_low, low, high), np.where(from_low, step, -step)
    turns = np.round(outer / step)
    step = np.where(turns != 0, outer / np.where(turns != 0, turns, 1), step)
    offset = np.where(turns != 0, outer, np.float32(0))
    return np.clip(np.round((x - offset) / step), 0, 2**bits - 1), step, offset


def _scaled_format(x: np.ndarray, name: str) -> np.ndarray:
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / FORMATS[name][2]
    return to_format(x / scale, name) * scale


def _micro(x: np.ndarray, name: str) -> np.ndarray:
    """A power of two scales each group."""
    largest = np.floor(np.log2(np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30)))
    scale = 2.0 ** (largest - np.floor(np.log2(FORMATS[name][2])))
    return to_format(x / scale, name) * scale


_KINDS: dict[Callable, tuple[str, float]] = {
    _symmetric: (", symmetric", 2.1),
    _wide: (", with the lowest code", 2.1),
    _affine: ("", 2),
    _towards_zero: (", zero kept", 2.1),
    _wide_steps: (", zero kept, in steps of float32", 2.2),
}
