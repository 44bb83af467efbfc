"""What can be wrong with a file: each function changes one, or makes one, and says in a word or two how."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from random import Random

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lance_mlx.media.write import METADATA_KEY

NASTY = [None, True, -1, 0, 3, 0.5, 2**31, 2**63, 10**15, 10**400, 1e308, float("nan"), float("inf"), "", "a", "../..",
         "/etc", "[/a]", "\0", "\x1b[31mred", "\u202eé\ud800", "a" * 10_000, [], ["a"], {}, {"a": ["b"]}]  # fmt: skip
TEXTS = [b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xff\xfe\0", b"null", b"[]", b"3", b'"a"', b"{}", b"NaN",
         b'{"a": 1e999}', b"9" * 5000, b"\0" * 100, "{}".encode("utf-16"), b"hello\n"]  # fmt: skip
WIDTHS = {"F32": 4, "BF16": 2, "I32": 4, "F16": 2, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}
LINKS = {"loop": None, "dangling": "nowhere", "zeros": "/dev/zero", "null": "/dev/null", "outside": "/etc/hostname"}
SIZES = [(2**31 - 1, 2**31 - 1), (65535, 65535), (30000, 30000), (13000, 13000), (0, 0), (1, 70000), (48, 10**6)]
MODES = {".png": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"], ".jpg": ["L", "RGB", "CMYK"], ".gif": ["P"],
         ".webp": ["RGB", "RGBA"], ".tiff": ["F", "I;16", "RGB", "LAB", "CMYK"], ".bmp": ["RGB", "1"],
         ".heic": ["RGB", "RGBA"]}  # fmt: skip
CODECS = [(".mp4", "libx264", "yuv420p"), (".mov", "libx264", "yuv420p"), (".mp4", "libx265", "yuv420p10le"),
          (".mov", "prores_ks", "yuva444p10le"), (".mkv", "ffv1", "gray16le"), (".mov", "png", "rgba"),
          (".avi", "mjpeg", "yuvj420p"), (".webm", "libvpx-vp9", "yuv420p"), (".mov", "rawvideo", "rgb24")]  # fmt: skip


def damage(rng: Random, path: Path) -> str:
    """Change a file in a way of its sort, or of any."""
    own = {".json": any_json, ".safetensors": any_tensors, ".pth": any_pth}.get(path.suffix, any_bytes)
    how = any_place if rng.random() < 0.15 else own if rng.random() < 0.8 else any_bytes
    return how(rng, path)


def any_place(rng: Random, path: Path) -> str:
    """Something else than a file stands there, or one that cannot be read."""
    what = rng.choice(["gone", "folder", "pipe", "unreadable", *LINKS])
    if what == "unreadable":
        path.chmod(0)
        return what
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what in LINKS:
        path.symlink_to(LINKS[what] or path.name)
    return what


def any_bytes(rng: Random, path: Path) -> str:
    """Other bytes."""
    data = path.read_bytes()
    at, flipped = rng.randrange(len(data) + 1), bytearray(data or b"a")
    for _ in range(rng.choice([1, 3, 30])):
        flipped[rng.randrange(min(len(flipped), rng.choice([200, len(flipped)])))] ^= 1 << rng.randrange(8)
    how = {"empty": b"", "cut": data[:at], "flipped": bytes(flipped), "zeroed": data[:at] + bytes(len(data) - at),
           "noise": rng.randbytes(rng.choice([7, 1000])), "longer": data + rng.randbytes(9),
           "doubled": data[:at] + data, "another's": rng.choice(TEXTS)}  # fmt: skip
    what = rng.choice([*how, "cut", "flipped", "flipped"])
    path.write_bytes(how[what])
    return what


def any_value(rng: Random, document: object) -> str:
    """A value somewhere in a JSON document is another one, gone, or under another name."""
    node = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if not (isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7):
            break
        node = node[key]
    what = rng.choice(["value"] * 5 + ["gone", "added", "renamed"])
    if what == "value":
        node[key] = rng.choice([*NASTY, node[rng.choice(keys)]])
    elif what == "gone":
        del node[key]
    elif isinstance(node, list):
        node.insert(key, rng.choice([*NASTY, node[key]]))
    else:
        node[str(rng.choice(NASTY))[:50]] = rng.choice(NASTY) if what == "added" else node.pop(key)
    return what


def any_json(rng: Random, path: Path) -> str:
    """Another document, or another value in it."""
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    if not document or rng.random() < 0.2:
        path.write_bytes(rng.choice([*TEXTS, text.replace("{", '{"format": 3, ', 1).encode(), text.encode("utf-16"),
                                     b"\xef\xbb\xbf" + text.encode(), text.encode().replace(b"a", b"\0")]))  # fmt: skip
        return "text"
    what = any_value(rng, document)
    path.write_text(json.dumps(document))
    return what


def any_tensors(rng: Random, path: Path) -> str:
    """Other tensors, or a header that lies."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    new, end, lies = {key: header.pop(key) for key in ("__metadata__",) if key in header}, 0, {}
    held = {key: [entry["dtype"], entry["shape"], data[start:][slice(*entry["data_offsets"])]]
            for key, entry in header.items()}  # fmt: skip
    name = rng.choice(list(held))
    dtype, shape, values = held[name]
    what = rng.choice("header length claims dtype reshaped missing extra values finite empty swapped cut".split())
    if what == "claims":
        claimed = rng.choice([[10**15], [10**8, 10**7], [2**63], [2**64], [-1], [0, 10**18], ["3"], 4])
        offsets = [0, rng.choice([0, 4 * 10**15, len(values)])]
        lies = {name: {"dtype": dtype, "shape": claimed, "data_offsets": offsets}}
    elif what == "dtype":
        held[name][0] = other = rng.choice([*WIDTHS, "F8_E4M3", "X", 3])
        held[name][2] = bytes(len(values) // WIDTHS[dtype] * WIDTHS.get(other, WIDTHS[dtype]))
    elif what == "reshaped":
        held[name][1] = rng.choice([shape[::-1], [*shape, 1], [len(values) // WIDTHS[dtype]], []])
    elif what == "missing":
        del held[name]
    elif what == "extra":
        held[rng.choice(["a", "", "\0", "cond.step9/hidden_out", f"{name}.x", "\x1b[31m", "a" * 5000])] = held[name]
    elif what in ("values", "finite"):
        bits = np.frombuffer(values, "<u2" if WIDTHS[dtype] == 2 else "<u4").copy()
        some = [rng.randrange(bits.size) for _ in range(rng.choice([1, bits.size // 2 + 1]) if bits.size else 0)]
        bad = {"BF16": 0x7FC0, "F32": rng.choice([0x7FC00000, 0x7F800000])}.get(dtype, 1 << 15)
        bits[some] = bad if what == "values" else bits[some] ^ rng.choice([1, 1 << 9])
        held[name][2] = bits.tobytes()
    elif what == "empty":
        held[name][1:] = [0, *shape[1:]], b""
    elif what == "swapped":
        other = rng.choice(list(held))
        held[name], held[other] = held[other], held[name]
    elif what == "cut" and shape and shape[0]:
        held[name][1:] = [shape[0] - 1, *shape[1:]], values[: len(values) // shape[0] * (shape[0] - 1)]
    for key, (dtype, shape, values) in held.items():
        new[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(values)]}
    new |= lies
    if what == "header":
        any_value(rng, new)
    text = json.dumps(new).encode()
    length = rng.choice([0, 1, 10**8, 10**15, 2**64 - 1, len(text) - 1]) if what == "length" else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + b"".join(values for *_, values in held.values()))
    return f"tensors {what}"


class Runs:
    """What a pickle must never do."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def any_pth(rng: Random, path: Path) -> str:
    """Another archive than torch.save makes."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    state = next(name for name in members if name.endswith("data.pkl"))
    order = state.replace("data.pkl", "byteorder")
    large, changed = max(members, key=lambda name: len(members[name])), bytearray(members[state])
    for _ in range(rng.choice([1, 20])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    what = rng.choice("runs runs crc deflated missing pickle pickle two big bomb short nested".split())
    made = {"runs": lambda: {state: pickle.dumps(rng.choice([Runs(), {"a": Runs()}]))},
            "pickle": lambda: {state: bytes(changed)}, "two": lambda: {"b/data.pkl": members[state]},
            "big": lambda: {order: b"big"}, "bomb": lambda: {order: b"l" * (1 << 30)},
            "short": lambda: {large: members[large][:-4]},
            "nested": lambda: {state: b"\x80\x02" + b"(" * 10**6 + b"l" * 10**6 + b"."}}  # fmt: skip
    members |= made[what]() if what in made else {}
    if what == "missing":
        del members[rng.choice(list(members))]
    with zipfile.ZipFile(path, "w", compresslevel=1) as archive:
        for name, data in members.items():
            deflated = what == "deflated" or (what, name) == ("bomb", order)
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED)
    if what == "crc":
        whole = bytearray(path.read_bytes())
        whole[whole.find(members[large][:64]) + rng.randrange(len(members[large]))] ^= 4
        path.write_bytes(whole)
    return f"pth {what}"


def any_image(rng: Random, stem: Path) -> tuple[Path, str]:
    """An image of any form, which may be damaged, claim another size, or inflate to much."""
    suffix = rng.choice(list(MODES))
    path, mode = stem.with_suffix(suffix), rng.choice(MODES[suffix])
    pixels = np.random.default_rng(rng.randrange(99)).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode if mode != "LAB" else "RGB").convert(mode)
    what = rng.choice(["good", "damaged", "damaged", "damaged", "claims", "bomb", "moves", "notes", "named"])
    if suffix == ".heic":
        with suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    if what == "bomb":
        path = stem.with_suffix(".png")
        Image.new("1", rng.choice([(13000, 13000), (30000, 30000), (16, 300), (8, 8)])).save(path, compress_level=1)
        return path, what
    options = {"save_all": True, "append_images": [image] * 3} if what == "moves" else {}
    if what == "notes":
        options = {"exif": rng.randbytes(40), "icc_profile": rng.randbytes(300)}
    try:
        image.save(path, **options)
    except (OSError, KeyError, ValueError, TypeError, SyntaxError):  # there is no such form, or no pillow_heif
        path.write_bytes(rng.randbytes(500))
    if what == "damaged":
        return path, damage(rng, path)
    if what == "named":
        return path.rename(stem.with_suffix(rng.choice([".png", ".heic", ".mp4", ".svg", ""]))), what
    if what == "claims":
        data, (width, height) = bytearray(path.read_bytes()), rng.choice(SIZES)
        small = min(width, 65535), min(height, 65535)
        if suffix == ".png":
            data[16:24] = struct.pack(">II", width, height)
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        elif suffix == ".gif":
            data[6:10] = struct.pack("<HH", *small)
        elif suffix == ".bmp":
            data[18:26] = struct.pack("<II", width, height)
        elif suffix == ".jpg":
            at = data.find(b"\xff\xc0") + 5
            data[at : at + 4] = struct.pack(">HH", *small)
        path.write_bytes(data)
    return path, what


def any_notes(rng: Random, stem: Path) -> tuple[Path, str]:
    """An image as lance-mlx writes it, whose metadata are damaged."""
    request = {"task": "t2i", "prompt": "a", "height": 32, "width": 32, "num_steps": 1, "seed": 3, "visuals": [],
               "guidance_interval": [0.4, 1.0], "timestep_shift": 3.5}  # fmt: skip
    made = {"generator": "lance-mlx", "model": "a", "variant": "Lance_3B", "numerics": "bfloat16", "reencode": False,
            "noise": None, "request": request, "earlier": rng.choice([[], [], [request]])}  # fmt: skip
    text = stem.with_suffix(".json")
    text.write_text(json.dumps(made))
    what, path = any_json(rng, text), stem.with_suffix(rng.choice([".png", ".gif", ".jpg", ".webp"]))
    noted, exif, image = text.read_text(errors="replace"), Image.Exif(), Image.new("RGB", (32, 32))
    text.unlink()
    whole = json.dumps({METADATA_KEY: json.loads(noted)}) if what != "text" and path.suffix != ".png" else noted
    exif[0x010E] = whole
    png = PngInfo()
    png.add_itxt(METADATA_KEY, whole.replace("\0", ""), zip=rng.random() < 0.5)
    image.save(path, **{".png": {"pnginfo": png}, ".gif": {"comment": whole.encode()}}.get(path.suffix, {"exif": exif}))
    return path, what


def any_video(rng: Random, stem: Path) -> tuple[Path, str]:
    """A video of any form, which may be damaged, empty, or claim another size."""
    suffix, codec, form = rng.choice(CODECS)
    path, what = stem.with_suffix(suffix), rng.choice(["good", "damaged", "damaged", "damaged", "claims", "named"])
    # Some codecs refuse some rates, and then leave a file without an end.
    with suppress(av.error.FFmpegError), av.open(str(path), "w") as container:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=rng.choice([1, 24, 30, 1000]), options=quiet)
        stream.width, stream.height, stream.pix_fmt = 64, 48, form
        for index in range(rng.choice([0, 1, 2, 9, 30])):
            pixels = np.full((48, 64, 3), index * 8, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    path.touch()  # which a container without a frame may not have made
    if what == "damaged":
        return path, damage(rng, path)
    if what == "named":
        return path.rename(stem.with_suffix(rng.choice([".png", ".gif", ".mp4", ""]))), what
    if what == "claims":
        data, size = bytearray(path.read_bytes()), rng.choice(SIZES)
        for mark, places in ((b"tkhd", 80), (b"avc1", 28), (b"png ", 28), (b"raw ", 28), (b"hvc1", 28), (b"ap4h", 28)):
            if (at := data.find(mark) + places) > places:
                form = ">II" if mark == b"tkhd" else ">HH"
                sized = [min(side, 65535) << (16 if mark == b"tkhd" else 0) for side in size]
                data[at : at + struct.calcsize(form)] = struct.pack(form, *sized)
        path.write_bytes(data)
    return path, what
