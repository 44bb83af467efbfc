"""The layouts that a checkpoint comes in, and how one is found in a folder."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lance_mlx.checkpoint.converted_config import MODEL_TYPE, check_facts, check_vae
from lance_mlx.checkpoint.preview import RGB_FACTORS, from_text
from lance_mlx.checkpoint.pth import read_pth
from lance_mlx.checkpoint.recipe import KEYS, stored_recipe
from lance_mlx.checkpoint.safetensors import Tensors, read_header, read_notes
from lance_mlx.checkpoint.tensors import (
    POSITION_TABLE,
    VIT,
    Checkpoint,
    Config,
    Part,
    ViTSource,
    channels_last,
    is_lance,
)
from lance_mlx.checkpoint.weights import decoder_shape, encoder_shape
from lance_mlx.config import MAX_LATENT_SIDE, read_config
from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Variant

INDEX = "model.safetensors.index.json"
VAE = "vae."
"""Prefix of the VAE's tensors in a converted checkpoint."""
_CONFIG = "config.json"
_LLM_CONFIG = "llm_config.json"
_VIT_FOLDER = "Qwen2.5-VL-ViT"
_VAE_FILES = ("Wan2.2_VAE.safetensors", "Wan2.2_VAE.pth")
_GIVE_ONE = "give the folder of a Lance checkpoint"
_VIT_NEEDED = "tasks that look at pictures need the ViT"


def read_vae(path: Path) -> Part:
    """The VAE in a .pth or .safetensors file with Wan 2.2's own names and kernels."""
    return Part(path, channels_last(read_pth(path) if path.suffix == ".pth" else read_header(path)))


class OfficialCheckpoint(Checkpoint):
    """`Lance_3B` or `Lance_3B_Video`, with the VAE and the ViT's folder inside or beside it."""

    rounded = False

    def __init__(self, folder: Path) -> None:
        """Locate the files; raises LanceError for one that is missing."""
        self.folder = folder
        candidates = (folder / "model.safetensors", folder / "ema.safetensors")
        weights = next((path for path in candidates if path.is_file()), None)
        if weights is None:
            raise LanceError(f"{folder / 'model.safetensors'} is missing: fetch it again")
        self._weights = weights
        places = (folder, folder.parent)
        files = [place / name for place in places for name in _VAE_FILES]
        vae = next((path for path in files if path.is_file()), None)
        if vae is None:
            raise LanceError(f"no {' or '.join(_VAE_FILES)} in {folder} or {folder.parent}: the VAE belongs there")
        self._vae = vae
        self._vit = next((place / _VIT_FOLDER for place in places if (place / _VIT_FOLDER).is_dir()), None)

    @property
    def variant(self) -> Variant:
        """By the folder's name, or else by what the file holds."""
        if self.folder.name in list(Variant):
            return Variant(self.folder.name)
        tensors = read_header(self._weights)
        return _variant_of(tensors, any(name.startswith(VIT) for name in tensors))

    def llm_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        return read_config(self.folder / _LLM_CONFIG, build, _GIVE_ONE)

    def vit_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        return read_config(self._vit_file(_CONFIG), build, "it comes with the official checkpoint's vision tower")

    def lance(self) -> Part:
        tensors = read_header(self._weights)
        return Part(self._weights, {name: tensor for name, tensor in tensors.items() if is_lance(name)})

    def vit(self, source: ViTSource) -> Part:
        own = {name: tensor for name, tensor in read_header(self._weights).items() if name.startswith(VIT)}
        if own and source is ViTSource.LANCE:
            return Part(self._weights, own)
        path = self._vit_file("vit.safetensors")
        return Part(path, {f"{VIT}{name}": tensor for name, tensor in read_header(path).items()})

    def vit_origin(self, source: ViTSource) -> ViTSource:
        return source if any(name.startswith(VIT) for name in read_header(self._weights)) else ViTSource.VIT_FILE

    def vae(self) -> Part:
        return read_vae(self._vae)

    def rgb_factors(self) -> np.ndarray | None:
        if self._vae.suffix == ".pth":
            return None
        return from_text(read_notes(self._vae).get(RGB_FACTORS), self.vae().tensors)

    def _vit_file(self, name: str) -> Path:
        path = (self._vit or self.folder.parent / _VIT_FOLDER) / name
        if not path.is_file():
            raise LanceError(f"{path} is missing: {_VIT_NEEDED}")
        return path


class ConvertedCheckpoint(Checkpoint):
    """What `lance-mlx convert` writes: shards with an index, and config.json with everything else."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        """Check config.json; raises LanceError naming what is missing or contradicts this version."""
        self.folder = folder
        path = folder / _CONFIG
        check_facts(values, path)
        self.variant, self.rounded = Variant(values["variant"]), values["dtype"] == "bfloat16"
        self.quantization = stored_recipe(values, path)
        self._vit_source = ViTSource(values["vit_source"])
        self._vae_config = values["vae_config"]

    def llm_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        return read_config(self.folder / _CONFIG, lambda values: build(values["llm_config"]), _GIVE_ONE)

    def vit_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        return read_config(self.folder / _CONFIG, lambda values: build(values["vit_config"]), _GIVE_ONE)

    def lance(self) -> Part:
        return self._part(lambda name: not name.startswith((VIT, VAE)))

    def vit(self, source: ViTSource) -> Part:
        if source is ViTSource.VIT_FILE and self._vit_source is not source:
            again = f"convert once more with lance-mlx convert --vit-source {source}"
            raise LanceError(f"{self.folder} holds the Lance file's ViT: {again}")
        return self._part(lambda name: name.startswith(VIT))

    def vit_origin(self, source: ViTSource) -> ViTSource:
        return self._vit_source

    def vae(self) -> Part:
        path, tensors = self._part(lambda name: name.startswith(VAE))
        part = Part(path, {name.removeprefix(VAE): tensor for name, tensor in tensors.items()})
        check_vae(self._vae_config, decoder_shape(part), encoder_shape(part), path / _CONFIG)
        return part

    def rgb_factors(self) -> np.ndarray | None:
        notes = self._index("metadata")
        return from_text(notes.get(RGB_FACTORS), self.vae().tensors) if isinstance(notes, dict) else None

    def _index(self, key: str) -> Any:
        return read_config(self.folder / INDEX, lambda values: values.get(key), "convert the checkpoint again")

    def _part(self, belongs: Callable[[str], bool]) -> Part:
        path, places = self.folder / INDEX, self._index("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise LanceError(f"{path} has no weight_map: convert the checkpoint again")
        names = [name for name in places if belongs(name)]
        files = {file: read_header(self.folder / file) for file in sorted({places[name] for name in names})}
        lost = next((name for name in names if name not in files[places[name]]), None)
        if lost is not None:
            raise LanceError(f"{self.folder / places[lost]}: tensor '{lost}' is missing: convert the checkpoint again")
        return Part(self.folder, {name: files[places[name]][name] for name in names})


class CommunityCheckpoint(Checkpoint):
    """What xocialize/lance-mlx publishes as mlx-community/Lance-3B-bf16 and -Video-bf16 (its scripts/02_convert.py and
    06_convert_wan_vae.py at d39a981): the language model without its prefix, the ViT, and the VAE for mlx-video."""

    rounded = True

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        """Read what config.json says of packed weights; raises LanceError where MLX did not pack them."""
        self.folder = folder
        stored = stored_recipe(values, folder / _CONFIG)
        if stored is not None:
            patterns = ((_official_lance(f"{path}.").removesuffix("."), scheme) for path, scheme in stored.patterns)
            stored = replace(stored, patterns=tuple(patterns))
        self.quantization = stored

    @property
    def variant(self) -> Variant:
        """By the position table, which is kept in this layout."""
        return _variant_of(self._read("model.safetensors"), False)

    def llm_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        def own(values: dict[str, Any]) -> Config:
            return build({key: value for key, value in values.items() if key not in KEYS})

        return read_config(self.folder / _CONFIG, own, _GIVE_ONE)

    def vit_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        return read_config(self.folder / _CONFIG, lambda values: build(values.get("vision_config", {})), _GIVE_ONE)

    def lance(self) -> Part:
        tensors = {_official_lance(name): tensor for name, tensor in self._read("model.safetensors").items()}
        return Part(self.folder, {name: tensor for name, tensor in tensors.items() if is_lance(name)})

    def vit(self, source: ViTSource) -> Part:
        if not (self.folder / "vit.safetensors").is_file():
            raise LanceError(f"{self.folder / 'vit.safetensors'} is missing: {_VIT_NEEDED}")
        return Part(self.folder, {f"{VIT}{name}": tensor for name, tensor in self._read("vit.safetensors").items()})

    def vit_origin(self, source: ViTSource) -> ViTSource:
        return ViTSource.LANCE if self.variant is Variant.VIDEO else ViTSource.VIT_FILE

    def vae(self) -> Part:
        tensors = self._read("vae.safetensors")
        return Part(self.folder, {_official_vae(name): tensor for name, tensor in tensors.items()})

    def _read(self, name: str) -> Tensors:
        return read_header(self.folder / name)


LAYOUTS = {
    OfficialCheckpoint: "official layout",
    ConvertedCheckpoint: "written by lance-mlx convert",
    CommunityCheckpoint: "as mlx-community publishes it",
}
"""The layouts in words."""


def _official_lance(name: str) -> str:
    if name.startswith(("embed_tokens.", "layers.", "norm.", "norm_moe_gen.")):
        return f"language_model.model.{name}"
    for theirs, ours in (
        ("lm_head.", "language_model.lm_head."),
        ("vae_in_proj.vae2llm.", "vae2llm."),
        ("time_embedder.proj_in.", "time_embedder.mlp.0."),
        ("time_embedder.proj_out.", "time_embedder.mlp.2."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _official_vae(name: str) -> str:
    name = re.sub(r"\.layer_(\d+)\.", r".\1.", name)
    name = re.sub(r"\.resample_(weight|bias)$", r".resample.1.\1", name)
    return re.sub(r"\.(to_qkv|proj)_(weight|bias)$", r".\1.\2", name)


def _variant_of(tensors: Tensors, has_vit: bool) -> Variant:
    table = tensors.get(POSITION_TABLE)
    long = table is not None and len(table.shape) == 2 and table.shape[0] > MAX_LATENT_SIDE**2
    return Variant.VIDEO if has_vit or long else Variant.IMAGE


def check_folder(path: Path) -> None:
    """Raise LanceError unless there is such a folder, which costs nothing before a model is read."""
    if path.exists() and not path.is_dir():
        raise LanceError(f"model {path} is no folder: {_GIVE_ONE}")
    if not path.is_dir():
        raise LanceError(f"model folder {path} does not exist: {_GIVE_ONE}, or a repository as OWNER/NAME")


def variants_in(path: Path) -> tuple[Variant, ...]:
    """The variants that a folder holds; raises LanceError for a folder that holds no checkpoint."""
    return tuple(checkpoint.variant for checkpoint in _checkpoints(path))


def find_checkpoint(path: Path, variant: Variant) -> Checkpoint:
    """Find a variant in a folder, in whichever layout.

    Args:
        path: the folder that holds Lance_3B, Lance_3B_Video, the ViT and the VAE, or one of the first two; a converted
            checkpoint; or one that mlx-community publishes.

    Raises:
        LanceError: there is no such variant, or a file is missing.
    """
    check_folder(path)
    if not (path / _LLM_CONFIG).is_file() and (path / variant / _LLM_CONFIG).is_file():
        # Whatever state the other variant is in.
        return OfficialCheckpoint(path / variant)
    found = _checkpoints(path)
    for checkpoint in found:
        if checkpoint.variant is variant:
            return checkpoint
    held = found[0].variant
    raise LanceError(
        f"{path} holds {held} and this needs {variant}: give a checkpoint with that, or ask for variant {held.kind} to "
        "use what is there all the same"
    )


def _checkpoints(path: Path) -> Sequence[Checkpoint]:
    if (path / _LLM_CONFIG).is_file():
        return [OfficialCheckpoint(path)]
    if (path / _CONFIG).is_file():
        values = read_config(path / _CONFIG, dict, _GIVE_ONE)
        converted = values.get("model_type") == MODEL_TYPE
        return [ConvertedCheckpoint(path, values) if converted else CommunityCheckpoint(path, values)]
    folders = [path / variant for variant in Variant if (path / variant / _LLM_CONFIG).is_file()]
    if not folders:
        names = " nor ".join((_LLM_CONFIG, _CONFIG, *(f"{variant}/{_LLM_CONFIG}" for variant in Variant)))
        raise LanceError(f"{path} holds neither {names}: {_GIVE_ONE}")
    return [OfficialCheckpoint(folder) for folder in folders]
