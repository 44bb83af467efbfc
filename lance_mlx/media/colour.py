"""Colours that are not sRGB's, brought to sRGB: pictures by their ICC profile, HDR by a tone curve."""

import io
from functools import cache

import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc
from PIL import Image, ImageCms

HDR = (ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084)
"""Transfers of HDR: HLG, which phones record, and PQ."""
WHITE, PEAK = 203, 1000
"""Nits of a white page in an HDR picture (ITU-R BT.2408), and of the brightest that is told apart."""
KNEE = 0.6
"""Up to this share of a white page's light, the sRGB value 203, nothing changes: SDR colours in HDR are themselves."""
_LUMINANCE = np.array((0.2627, 0.6780, 0.0593), np.float32)
_TO_BT709 = {
    ColorPrimaries.BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    ColorPrimaries.SMPTE432: ((1.2249, -0.2249, 0), (-0.0421, 1.0421, 0), (-0.0196, -0.0786, 1.0983)),
    ColorPrimaries.BT709: ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}
"""From the primaries of BT.2020, of Display P3, and its own."""
_LINEAR_STEPS = 65535
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's modes of what ICC profiles describe."""


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


def tone_map(frame: np.ndarray, transfer: int, primaries: int = ColorPrimaries.BT2020) -> np.ndarray:
    """The sRGB frame, uint8 [H, W, 3], to show for one of 10 bits, uint16 [H, W, 3], of a transfer of `HDR`.

    Primaries are ITU-T H.273's numbers; those that are neither Display P3's nor BT.709's count as BT.2020's.

    Light up to `KNEE` of a white page's is kept; from there to `PEAK` the largest of red, green and blue goes up to 1
    along Reinhard's extended curve, the other two in proportion, so that a white page is (231, 231, 231). What lies
    outside sRGB's gamut is clipped. HLG is shown as on a screen of 1000 nits.

    Source: ITU-R BT.2100 (transfers), BT.2087 (primaries), IEC 61966-2-1 (sRGB).
    """
    if transfer == ColorTrc.ARIB_STD_B67:
        scene = _hlg_light()[frame]
        light = scene * (PEAK / WHITE * (scene @ _LUMINANCE) ** np.float32(0.2))[..., None]
    else:
        light = _pq_light()[frame]
    light = light @ np.array(_TO_BT709.get(primaries, _TO_BT709[ColorPrimaries.BT2020]), np.float32).T
    # Some times faster than `max` over so short an axis.
    brightest = np.maximum(np.maximum(light[..., :1], light[..., 1:2]), np.maximum(light[..., 2:], KNEE))
    over, most = (brightest - KNEE) / (1 - KNEE), (PEAK / WHITE - KNEE) / (1 - KNEE)
    light *= (KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + over)) / brightest
    return _srgb_values()[(light.clip(0, 1) * _LINEAR_STEPS + 0.5).astype(np.uint16)]


@cache
def _hlg_light() -> np.ndarray:
    """Light of the scene by HLG's 10-bit signal, 1 at its peak."""
    signal = np.arange(1024) / 1023
    above = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return np.where(signal <= 0.5, signal**2 / 3, above).astype(np.float32)


@cache
def _pq_light() -> np.ndarray:
    """Light by PQ's 10-bit signal, 1 for a white page."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = (np.arange(1024) / 1023) ** (1 / m2)
    return (10000 / WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)).astype(np.float32)


@cache
def _srgb_values() -> np.ndarray:
    """sRGB's 8 bits by linear light."""
    light = np.arange(_LINEAR_STEPS + 1) / _LINEAR_STEPS
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * values).astype(np.uint8)
