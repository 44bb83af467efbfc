#!/usr/bin/env python3
"""Copy the oracle bundles that a fresh clone needs into the repository, with a checksum for every file.

    python scripts/embed_oracles.py SOURCE DEST

Needs the standard library alone. SOURCE is a full set of captured oracles; DEST (usually `oracles/`) is updated file by
file, and DEST/MANIFEST.json lists it. A README.md in DEST is left as it is, and so is what the project adds there and
SOURCE does not have: the floors of bundles, and bundles that lance-parity recorded; they are listed too. Exit status 2
on bad input.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

# Every way of drawing and answering but video editing, both entries and both numerics.
EMBEDDED = (
    "checkpoint-a",
    "i2v-fp32-nokv",
    "image_edit-fp32-nokv",
    "layouts/image_edit-768.json",
    "layouts/image_edit-768.npz",
    "layouts/t2i-768.json",
    "layouts/t2i-768.npz",
    "layouts/t2v-480x848x121.json",
    "layouts/t2v-480x848x121.npz",
    "layouts/t2v-768x768x50.json",
    "layouts/t2v-768x768x50.npz",
    "layouts/x2t_image-768.json",
    "layouts/x2t_image-768.npz",
    "media/garden.png",
    "media/photo.png",
    "media/square.png",
    "t2i-fp32-kv",
    "t2i-fp32-nokv",
    "t2v-bf16-kv",
    "t2v-fp32-nokv",
    "x2t_image-bf16-kv",
    "x2t_image-fp32-nokv",
)
# Upstream drops this tensor when it loads a checkpoint; without it the two models are half as large.
NOT_READ = "latent_pos_embed.pos_embed"
KEPT = {"MANIFEST.json", "README.md"}
# What the project adds to a captured bundle, and what the manifest of a bundle of its own names as source.
FLOORS = "floors.*"
RECORDED = "lance-mlx reference"
MAX_BYTES = 15_000_000


class EmbedError(Exception):
    """Bad input; the message is the one line shown."""


def selected_files(source: Path) -> list[Path]:
    """Paths relative to `source` of every file to embed, sorted; raises EmbedError naming one that is missing."""
    files: list[Path] = []
    for name in EMBEDDED:
        entry = source / name
        if entry.is_dir():
            files += [path.relative_to(source) for path in entry.rglob("*") if path.is_file()]
        elif entry.is_file():
            files.append(Path(name))
        else:
            raise EmbedError(f"{entry} is missing; SOURCE must be a full set of oracles")
    return sorted(files)


def embedded_bytes(path: Path) -> bytes:
    """Contents of a file as they are embedded: unchanged, but for a model's NOT_READ tensor, which is taken out."""
    data = path.read_bytes()
    if path.name != "model.safetensors":
        return data
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kept, pieces, end = {}, [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0]):
        if name == NOT_READ:
            continue
        if "data_offsets" in entry:
            begin, stop = entry["data_offsets"]
            pieces.append(body[begin:stop])
            entry = entry | {"data_offsets": [end, end + stop - begin]}
            end += stop - begin
        kept[name] = entry
    packed = json.dumps(kept, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed + b"".join(pieces)


def upstream_source(source: Path) -> str:
    """`implementation at commit` from the embedded bundles' manifests; raises EmbedError when they disagree."""
    found = set()
    for name in EMBEDDED:
        manifest = source / name / "manifest.json"
        if manifest.is_file():
            origin = json.loads(manifest.read_text(encoding="utf-8"))["source"]
            found.add(f"{origin['implementation']} at {origin['commit']}")
    if len(found) != 1:
        raise EmbedError(f"the bundles in {source} do not come from one commit: {sorted(found)}")
    return found.pop()


def project_made(dest: Path) -> list[Path]:
    """Paths relative to `dest` of what the project added to an earlier selection there, sorted."""
    files = [path for name in EMBEDDED for path in (dest / name).glob(FLOORS)]
    for manifest in dest.glob("[!.]*/manifest.json"):
        if json.loads(manifest.read_text(encoding="utf-8"))["source"]["implementation"] == RECORDED:
            files += [path for path in manifest.parent.iterdir() if path.is_file()]
    return sorted(path.relative_to(dest) for path in files)


def embed(source: Path, dest: Path) -> dict:
    """Copy the selected files, remove what no longer belongs, and return the manifest written to `dest`."""
    files = {path: embedded_bytes(source / path) for path in selected_files(source)}
    added = {path: (dest / path).read_bytes() for path in project_made(dest) if path not in files}
    files = dict(sorted((files | added).items()))
    total = sum(map(len, files.values()))
    if total > MAX_BYTES:
        raise EmbedError(f"the selection holds {total} bytes, more than the {MAX_BYTES} that the repository allows")
    manifest = {"format": "lance-oracles/1", "source": upstream_source(source), "files": {}}
    for path, data in files.items():
        if path not in added:
            write(dest / path, data)
        manifest["files"][path.as_posix()] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write(dest / "MANIFEST.json", (json.dumps(manifest, indent=1) + "\n").encode())
    remove_others(dest, {path.as_posix() for path in files} | KEPT)
    return manifest


def write(path: Path, data: bytes) -> None:
    """Write `data` through a temporary file beside `path`, readable by all and writable by its owner (0644)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def remove_others(dest: Path, wanted: set[str]) -> None:
    """Remove what an earlier selection left in `dest`, empty folders included."""
    for path in sorted(dest.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(dest).as_posix() not in wanted:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder with the full set of captured oracles")
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to update: a new one, or an earlier DEST")
    args = parser.parse_args()
    try:
        if args.source.resolve() == args.dest.resolve():
            raise EmbedError("SOURCE and DEST are the same folder")
        # Files outside the manifest are removed, so a folder that was never a DEST must not be taken for one.
        if args.dest.is_dir() and any(args.dest.iterdir()) and not (args.dest / "MANIFEST.json").is_file():
            raise EmbedError(f"{args.dest} is not empty and holds no MANIFEST.json; name a new folder")
        manifest = embed(args.source, args.dest)
    except (EmbedError, OSError) as error:
        print(f"embed_oracles: {error}", file=sys.stderr)
        return 2
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{args.dest}: {len(manifest['files'])} files, {total} bytes, from {manifest['source']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
