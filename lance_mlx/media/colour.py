"""Colours that are not sRGB's, brought to sRGB: pictures by their ICC profile, HDR videos by a tone curve."""

import io
from functools import cache

import numpy as np
from av.video.reformatter import ColorTrc
from PIL import Image, ImageCms, ImageFilter

HDR = (ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084)
"""Transfers of HDR videos: HLG, which phones record, and PQ."""
WHITE, PEAK = 203, 1000
"""Nits of a white page in an HDR picture (ITU-R BT.2408), and of the brightest that is told apart."""
KNEE = 0.6
"""Up to this share of a white page's light, the sRGB value 203, nothing changes: SDR colours in HDR are themselves."""
_LUMINANCE = (0.2627, 0.6780, 0.0593)
_TO_BT709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's modes of what ICC profiles describe."""
# The most that Pillow takes: every fourth of 256 values.
_TABLE_SIDE = 65


def to_srgb(image: Image.Image) -> Image.Image:
    """The 8-bit picture in sRGB by its ICC profile, with its transparency; itself where it has no profile that fits.

    A profile that is damaged, or describes other channels than there are, is left out of account, as browsers do.
    """
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(image.info["icc_profile"]))
        mode = _MODES[profile.profile.xcolor_space.strip()]
        # A grey picture or a palette may well have a profile of RGB.
        if image.mode.removesuffix("A") != mode and (mode != "RGB" or image.mode == "CMYK"):
            return image
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        # Pillow warns where a palette's transparency would be lost.
        colours = (image.convert("RGBA") if alpha and mode == "RGB" else image).convert(mode)
        converted = ImageCms.profileToProfile(colours, profile, _srgb(), outputMode="RGB")
    except (KeyError, ImageCms.PyCMSError):
        return image
    if alpha:
        converted.putalpha(alpha)
    return converted


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def tone_map(frame: np.ndarray, transfer: int) -> np.ndarray:
    """The sRGB frame, uint8 [H, W, 3], to show for a BT.2020 one, uint16 [H, W, 3], with a transfer of `HDR`.

    Light up to `KNEE` of a white page's is kept; from there to `PEAK` the largest of red, green and blue goes up to 1
    along Reinhard's extended curve, the other two in proportion, so that a white page is (231, 231, 231). What lies
    outside sRGB's gamut is clipped. HLG is shown as on a screen of 1000 nits.

    Source: ITU-R BT.2100 (transfers), BT.2087 (primaries), IEC 61966-2-1 (sRGB).
    """
    # To 8 bits here, since FFmpeg would round down.
    rounded = ((frame.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.asarray(Image.fromarray(rounded).filter(_tone_table(transfer)))


@cache
def _tone_table(transfer: int) -> ImageFilter.Color3DLUT:
    axis = np.linspace(0, 1, _TABLE_SIDE)
    signal = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")[::-1], axis=-1)
    nits = _hlg_nits(signal) if transfer == ColorTrc.ARIB_STD_B67 else _pq_nits(signal)
    light = np.maximum(nits / WHITE @ np.transpose(_TO_BT709), 0)
    brightest = np.clip(light.max(-1, keepdims=True), 1e-9, PEAK / WHITE)
    over, most = (brightest - KNEE) / (1 - KNEE), (PEAK / WHITE - KNEE) / (1 - KNEE)
    curve = KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + over)
    light = np.clip(light * np.where(over > 0, curve, brightest) / brightest, 0, 1)
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return ImageFilter.Color3DLUT(_TABLE_SIDE, values.astype(np.float32).reshape(-1))


def _hlg_nits(signal: np.ndarray) -> np.ndarray:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return PEAK * (scene @ _LUMINANCE)[..., None] ** 0.2 * scene


def _pq_nits(signal: np.ndarray) -> np.ndarray:
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = signal ** (1 / m2)
    return 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
