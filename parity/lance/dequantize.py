"""What MLX packs, unpacked by NumPy from what the format says: codes as a stream of bits, groups along the rows."""

from dataclasses import dataclass

import numpy as np

E2M1 = np.array([sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)
"""The numbers of four bits: a sign, two bits of exponent, one of mantissa."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is packed, as MLX writes it in config.json.

    Attributes:
        mode: affine (code * scale + bias), or mxfp4, mxfp8 and nvfp4 (small floats with a scale).
    """

    bits: int
    group_size: int
    mode: str = "affine"


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as MLX packs it.

    Attributes:
        weight: uint32 [rows, words].
        scales: [rows, groups], float32 or the uint8 of a small float.
        biases: float32 [rows, groups] in the affine mode, None in others.
    """

    scheme: Scheme
    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None

    @property
    def codes(self) -> np.ndarray:
        """uint8 [rows, width]: the words are a stream of bits, the lowest first."""
        stream = np.unpackbits(np.ascontiguousarray(self.weight).astype("<u4").view(np.uint8), bitorder="little")
        places = stream.reshape(len(self.weight), -1, self.scheme.bits)
        return np.packbits(places, axis=-1, bitorder="little")[..., 0]

    @property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and biases, float32 [rows, groups]."""
        if self.biases is not None:
            return self.scales.astype(np.float32), self.biases.astype(np.float32)
        power = np.ldexp(np.float32(1), self.scales.astype(np.int32) - 127)
        return e4m3(self.scales) if self.scheme.mode == "nvfp4" else power, np.zeros(self.scales.shape, np.float32)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What codes stand for before they are scaled, float32."""
        if self.biases is not None:
            return codes.astype(np.float32)
        return E2M1[codes] if self.scheme.bits == 4 else e4m3(codes)

    def dequantized(self) -> np.ndarray:
        """float32 [rows, width]."""
        return scaled(self.values(self.codes), *self.factors)


def scaled(values: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Values [rows, width] with factors [rows, groups] of groups along the rows."""
    grouped = values.reshape(*scales.shape, -1)
    return (grouped * scales[..., None] + biases[..., None]).reshape(values.shape)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """uint8 as floats of a sign, four bits of exponent and three of mantissa -> float32."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    return np.where(codes & 128, -size, size).astype(np.float32)
