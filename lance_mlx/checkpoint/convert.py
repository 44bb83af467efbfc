"""Conversion of a checkpoint in any layout to shards of safetensors, tensor by tensor, in bounded memory.

Shards are written to a hidden folder beside the destination, which takes its name when it is whole. A conversion that
was stopped goes on from there: a finished shard is kept if its tensors still have the checksums that were noted.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lance_mlx.backend.numerics import BFLOAT16, policy
from lance_mlx.checkpoint.converted_config import converted_config
from lance_mlx.checkpoint.folding import fold
from lance_mlx.checkpoint.layouts import INDEX, VAE, find_checkpoint, read_vae
from lance_mlx.checkpoint.model_card import model_card
from lance_mlx.checkpoint.packing import Added, Output, outputs_of
from lance_mlx.checkpoint.preview import RGB_FACTORS, to_text
from lance_mlx.checkpoint.pth import check_pth
from lance_mlx.checkpoint.recipe import Plan, Recipe, plan
from lance_mlx.checkpoint.safetensors import StoredTensor, read_header, write_safetensors
from lance_mlx.checkpoint.tensors import POSITION_TABLE, Checkpoint, Part, ViTSource
from lance_mlx.checkpoint.weights import (
    check_tensors,
    check_unpacked,
    decoder_shape,
    encoder_shape,
    inspect_lance,
    load_vae,
)
from lance_mlx.errors import LanceError
from lance_mlx.files import check_place, whole
from lance_mlx.model.vae import VAE as VAEModel
from lance_mlx.sampling.preview import fit_preview
from lance_mlx.sequence.tokenizer import TOKENIZER_FILES, LanceTokenizer

REPORT = "conversion_report.json"
_PLAN = "plan.json"
_METADATA = {"format": "mlx"}

Progress = Callable[[int], None]
"""Called with the number of bytes of the source that were done since the last call."""


@dataclass(frozen=True)
class Conversion:
    """What to convert, and to what; everything is checked and nothing but headers is read before the first shard.

    Attributes:
        source: what the user named, for the report and the model card.
        dtype: float32 or bfloat16, of every tensor that is not packed.
        shard_size: most bytes of a shard, unless one tensor is larger.
        recipe: what to quantize; without one, what is quantized is dequantized.
        added: what is added to weights, and where it is from: a line each.
    """

    source: str
    checkpoint: Checkpoint
    destination: Path
    dtype: str
    shard_size: int
    vit_source: ViTSource
    recipe: Recipe | None = None
    added: tuple[Added, Sequence[str]] = ({}, ())

    @property
    def staging(self) -> Path:
        """The hidden folder that becomes the destination."""
        return self.destination.with_name(f".{self.destination.name}.converting")

    def run(self, started: Callable[[int, int], Progress]) -> dict[str, Any]:
        """Convert; returns the report.

        Args:
            started: called with the bytes to read and those of them that are done already; returns what is called with
                progress.

        Raises:
            LanceError: something cannot be read or written; finished shards are kept.
        """
        self.checkpoint.check(policy(self.dtype))
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        outputs, config, quantized = self._inspect()
        try:
            return self._write(outputs, config, quantized, _shards(outputs, self.shard_size), started)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise LanceError(f"{self.destination.parent} is full: make room and run this again") from None
            raise LanceError(f"{self.destination} cannot be written ({error.strerror})") from None
        finally:
            if not any(self.staging.glob("*.safetensors")):
                shutil.rmtree(self.staging, ignore_errors=True)

    def _inspect(self) -> tuple[dict[str, Output], dict[str, Any], Plan]:
        """Every tensor to write, config.json, and what is quantized; raises LanceError for a checkpoint that would not
        load."""
        checkpoint, numerics = self.checkpoint, policy(self.dtype)
        architecture, quantized = inspect_lance(checkpoint, True, self.vit_source), Plan()
        model = architecture.build(numerics)
        if self.recipe is not None:
            check_unpacked(checkpoint, architecture.packed)
            quantized = plan(self.recipe, model)
        vae = checkpoint.vae()
        if vae.path.suffix == ".pth":
            check_pth(vae.path)
        decoder, encoder = decoder_shape(vae), encoder_shape(vae)
        check_tensors(VAEModel(decoder, encoder, numerics), [vae])
        LanceTokenizer(checkpoint.folder).check(architecture.config)
        llm, vit = checkpoint.llm_config(dict), checkpoint.vit_config(dict)
        origin = checkpoint.vit_origin(self.vit_source)
        config = converted_config(self.checkpoint.variant, self.dtype, origin, llm, vit, decoder, encoder, quantized)
        tensors = {name: tensor for part in architecture.parts for name, tensor in sorted(part.tensors.items())}
        if self.recipe is not None and self.recipe.scales:
            tensors = fold(tensors, self.recipe.scales)
        tensors |= {f"{VAE}{name}": tensor for name, tensor in sorted(vae.tensors.items())}
        outputs = outputs_of(tensors, self.dtype, quantized, architecture.packed, self.added[0])
        return outputs, config, quantized

    def _write(
        self,
        outputs: dict[str, Output],
        config: dict[str, Any],
        quantized: Plan,
        shards: list[list[str]],
        started: Callable[[int, int], Progress],
    ) -> dict[str, Any]:
        staging, plan = self.staging, self._plan(outputs)
        goes_on = _is_json(staging / _PLAN, plan)
        if not goes_on:
            shutil.rmtree(staging, ignore_errors=True)
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        notes = [staging / f"{name}.json" for name in names]
        kept = {name for name, note in zip(names, notes, strict=True) if _is_whole(staging / name, note)}
        sizes = {name: sum(outputs[t].read for t in shard) for name, shard in zip(names, shards, strict=True)}
        self._check_room(outputs, [shard for name, shard in zip(names, shards, strict=True) if name not in kept])
        if not goes_on:
            staging.mkdir()
            _save(staging / _PLAN, plan)
        progress = started(sum(sizes.values()), sum(sizes[name] for name in kept))
        for name, note, shard in zip(names, notes, shards, strict=True):
            if name not in kept:
                _save(note, self._write_shard(staging / name, {t: outputs[t] for t in shard}, progress))
        entries = {t: entry for note in notes for t, entry in json.loads(note.read_text(encoding="utf-8")).items()}
        report = self._report(entries, quantized)
        total = sum(output.info.nbytes for output in outputs.values())
        weight_map = {t: entry["converted"]["file"] for t, entry in entries.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _save(staging / INDEX, index)
        _save(staging / "config.json", config)
        # It is whole now, and its VAE can be read as it will be.
        index["metadata"][RGB_FACTORS] = self._rgb_factors(find_checkpoint(staging, self.checkpoint.variant).vae())
        _save(staging / INDEX, index)
        _save(staging / REPORT, report)
        card = model_card(self.checkpoint.variant, self.dtype, self.source, quantized)
        (staging / "README.md").write_text(card, encoding="utf-8")
        for file in TOKENIZER_FILES:
            shutil.copyfile(self.checkpoint.folder / file, staging / file)
        for path in (*notes, staging / _PLAN):
            path.unlink()
        staging.rename(self.destination)
        return report

    def _rgb_factors(self, vae: Part) -> str:
        """The map of latents to colours that goes with the VAE that was written."""
        stored = self.checkpoint.rgb_factors()
        return to_text(fit_preview(load_vae(vae, policy(self.dtype))) if stored is None else stored, vae.tensors)

    def _plan(self, outputs: dict[str, Output]) -> dict[str, Any]:
        """What a staged shard depends on."""
        scales = {self.recipe.scales} if self.recipe and self.recipe.scales else set()
        files = sorted({output.source.path for output in outputs.values()} | scales)
        stats = {str(path.resolve()): path.stat() for path in files}
        return {
            "files": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
            "options": [self.checkpoint.variant, self.dtype, self.shard_size, self.vit_source, *self.added[1]],
            "quantized": {name: str(output.scheme) for name, output in outputs.items() if output.scheme},
        }

    def _check_room(self, outputs: dict[str, Output], shards: list[list[str]]) -> None:
        needed = sum(outputs[name].info.nbytes for shard in shards for name in shard)
        free = shutil.disk_usage(self.destination.parent).free
        if needed > free:
            room = f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed"
            raise LanceError(f"{self.destination.parent} has {room}: make room, or choose another folder")

    def _write_shard(self, path: Path, outputs: dict[str, Output], progress: Progress) -> dict[str, Any]:
        """Write one shard; returns an entry of the report for each tensor."""
        entries: dict[str, Any] = {}

        def blocks(name: str) -> Iterator[np.ndarray]:
            output, before, after = outputs[name], hashlib.sha256(), hashlib.sha256()

            def watch(block: np.ndarray) -> None:
                before.update(block)
                progress(block.nbytes)

            for block in output.blocks(watch):
                block = np.ascontiguousarray(block)
                after.update(block)
                yield block
            # What else a weight becomes follows it, and is made with it.
            weight = entries.get(f"{name.rpartition('.')[0]}.weight")
            read = before.hexdigest() if output.read else weight["source"]["sha256"]
            entries[name] = _entry(output, read, path.name, after.hexdigest())

        beside = path.with_suffix(".partial")
        try:
            with beside.open("wb") as file:
                write_safetensors(file, {name: each.info for name, each in outputs.items()}, blocks, _METADATA)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
        return entries

    def _report(self, entries: dict[str, Any], quantized: Plan) -> dict[str, Any]:
        said = {"recipe": self.recipe.name, "not_in_groups": list(quantized.left)} if self.recipe else {}
        said |= {"added": list(self.added[1])} if self.added[1] else {}
        if self.recipe and self.recipe.scales:
            said["scales"] = str(self.recipe.scales)
        return said | {
            "source": self.source,
            "variant": str(self.checkpoint.variant),
            "dtype": self.dtype,
            "vit_source": str(self.checkpoint.vit_origin(self.vit_source)),
            "left_out": [POSITION_TABLE],
            "tensors": entries,
        }


def prepare(
    source: str,
    checkpoint: Checkpoint,
    destination: Path,
    dtype: str,
    shard_size: int,
    vit_source: ViTSource,
    recipe: Recipe | None = None,
    added: tuple[Added, Sequence[str]] = ({}, ()),
) -> Conversion:
    """A conversion whose options can be used; raises LanceError for those that cannot."""
    policy(dtype)
    if shard_size <= 0:
        raise LanceError("--shard-size must be more than 0 GB")
    if destination.exists():
        raise LanceError(f"{destination} exists already: choose another folder, or remove it")
    check_place(destination)
    return Conversion(source, checkpoint, destination, dtype, shard_size, vit_source, recipe, added)


def convert_vae(source: Path, destination: Path, overwrite: bool = True) -> int:
    """Write the VAE's tensors in a .pth file to a safetensors file, unchanged, with the map of its latents to colours;
    returns their number.

    Raises:
        LanceError: the source is no VAE or not what its checksums say, or the destination cannot be written, or is
            there and must not be overwritten.
    """
    if destination.suffix != ".safetensors":
        raise LanceError(f"{destination} must end in .safetensors")
    check_place(destination, overwrite)
    vae = read_vae(source)
    check_pth(source)
    notes = {"format": "pt", RGB_FACTORS: to_text(fit_preview(load_vae(vae, BFLOAT16)), vae.tensors)}
    try:
        with whole(destination) as part, part.open("wb") as file:
            infos = {name: tensor.info for name, tensor in vae.tensors.items()}
            write_safetensors(file, infos, lambda name: vae.tensors[name].stored_blocks(), notes)
    except OSError as error:
        raise LanceError(f"{destination} cannot be written ({error.strerror})") from None
    return len(vae.tensors)


def _shards(outputs: dict[str, Output], shard_size: int) -> list[list[str]]:
    shards, room = [], 0
    for name, output in outputs.items():
        size = output.info.nbytes
        if not shards or (size > room and output.read):
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= size
    return shards


def _entry(output: Output, before: str, file: str, after: str) -> dict[str, Any]:
    tensor, stored, info = output.source, output.source.info, output.info
    source = {"file": str(tensor.path), "name": tensor.name, "shape": list(stored.shape), "dtype": stored.dtype}
    converted = {"file": file, "shape": list(info.shape), "dtype": info.dtype, "sha256": after}
    if output.scheme is not None:
        converted |= output.scheme.to_dict()
    return {"source": source | {"sha256": before}, "converted": converted}


def _is_whole(shard: Path, note: Path) -> bool:
    """Whether a staged shard holds what was noted when it was finished."""
    try:
        entries, tensors = json.loads(note.read_text(encoding="utf-8")), read_header(shard)
        return entries.keys() == tensors.keys() and all(
            _sha256(tensor) == entries[name]["converted"]["sha256"] for name, tensor in tensors.items()
        )
    except (OSError, ValueError, KeyError, LanceError):
        return False


def _sha256(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for block in tensor.stored_blocks():
        digest.update(block)
    return digest.hexdigest()


def _is_json(path: Path, values: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == values
    except (OSError, ValueError):
        return False


def _save(path: Path, values: dict[str, Any]) -> None:
    """Write JSON beside its place and rename it there."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    beside.rename(path)
