"""Recipes: which weights are quantized, and how; MLX's own entry in config.json is one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from lance_mlx.config import read_config
from lance_mlx.errors import LanceError
from lance_mlx.model.quantized import Scheme, quantizable

KEYS = ("quantization", "quantization_config")
"""Of config.json, where MLX's tools write how a checkpoint is quantized; some write both."""
_SCHEME = {"bits", "group_size", "mode"}
_SCALES = "scales"
_VIT = "vit_model"
_LAYERS = "language_model.model.layers.*"
_BOTH_TOWERS = f"{_LAYERS}_proj", f"{_LAYERS}_proj_moe_gen"
"""The linear layers of attention and MLP."""


@dataclass(frozen=True)
class Recipe:
    """How each module is quantized.

    Attributes:
        name: what it was given as: a name, a file, or the number of bits.
        scheme: of both towers' attention and MLP, where no pattern matches.
        patterns: on the modules' paths in the official checkpoint, as a shell's; the first that matches decides, and
            None leaves a module as it is.
        scales: a file of scales that are moved into the weights before they are quantized, see folding.fold.
    """

    name: str | int
    scheme: Scheme
    patterns: tuple[tuple[str, Scheme | None], ...] = ()
    scales: Path | None = None

    @classmethod
    def from_dict(cls, name: str | int, values: Mapping[str, Any]) -> "Recipe":
        """Read MLX's form: bits, group_size and mode for all, and patterns with an object of those, true, or false.

        Raises:
            LanceError: a key or a value is none of these, or contradicts another.
        """
        given = {key: value for key, value in values.items() if key in _SCHEME}
        scheme, patterns = Scheme.of(**given), []
        for pattern, value in values.items():
            if pattern in _SCHEME:
                continue
            if isinstance(value, bool):
                patterns.append((pattern, scheme if value else None))
            elif isinstance(value, dict) and set(value) <= _SCHEME:
                # Another mode has its own bits and groups.
                given = {} if "mode" in value else scheme.to_dict()
                patterns.append((pattern, Scheme.of(**given | value)))
            else:
                raise LanceError(f"'{pattern}' must be true, false, or an object of bits, group_size and mode")
        return cls(name, scheme, tuple(patterns))

    @classmethod
    def from_file(cls, path: Path) -> "Recipe":
        """Read a JSON file, in which `scales` may name a file beside it; raises LanceError naming the recipe."""

        def build(values: dict[str, Any]) -> "Recipe":
            scales = values.pop(_SCALES, None)
            if not isinstance(scales, str | None):
                raise LanceError(f"'{_SCALES}' must be the name of a safetensors file")
            return replace(cls.from_dict(str(path), values), scales=scales and path.parent / scales)

        return read_config(path, build, f"give {_CHOICES}")

    def at(self, path: str) -> Scheme | None:
        """How the module at a path is quantized; None for not at all."""
        return self._match(path, self.scheme if any(fnmatchcase(path, each) for each in _BOTH_TOWERS) else None)

    def stored(self, path: str) -> Scheme | None:
        """How the module at a path is packed in a checkpoint that says so by this; None contradicts that it is."""
        return self._match(path, self.scheme)

    def _match(self, path: str, otherwise: Scheme | None) -> Scheme | None:
        return next((scheme for pattern, scheme in self.patterns if fnmatchcase(path, pattern)), otherwise)


class Plan(dict[str, Scheme]):
    """What a recipe makes of a model: how each module that it quantizes is quantized, by path.

    Attributes:
        left: the paths whose rows do not part into groups, which stay as they are.
    """

    left: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As MLX writes it in config.json: the most frequent scheme for all, and the modules that have another."""
        schemes = list(self.values())
        usual = max(schemes, key=schemes.count)
        return usual.to_dict() | {path: scheme.to_dict() for path, scheme in self.items() if scheme != usual}


def plan(recipe: Recipe, model: nn.Module) -> Plan:
    """Apply a recipe to a model, which may be without the ViT.

    Raises:
        LanceError: a pattern matches nothing, or nothing that can be quantized; or nothing is quantized at all.
    """
    modules, found, left = quantizable(model), Plan(), []
    _check_patterns(recipe, modules, model)
    for path, module in modules.items():
        scheme = recipe.at(path)
        if scheme is not None and scheme.fits(module.weight.shape[1]):
            found[path] = scheme
        elif scheme is not None:
            left.append(path)
    if not found and _VIT in model:
        raise LanceError(f"recipe {recipe.name} quantizes nothing" + (f": {_widths(left)}" if left else ""))
    found.left = tuple(left)
    return found


def _widths(left: list[str]) -> str:
    return f"the rows of '{left[0]}' and {len(left) - 1} more do not part into groups"


def _check_patterns(recipe: Recipe, modules: Iterable[str], model: nn.Module) -> None:
    for pattern, scheme in recipe.patterns:
        unseen = pattern.startswith(_VIT) and _VIT not in model
        if unseen or any(fnmatchcase(path, pattern) for path in modules):
            continue
        owners = (name.rpartition(".")[0] for name, _ in tree_flatten(model.parameters()))
        other = next((path for path in owners if fnmatchcase(path, pattern)), None)
        if other is None:
            raise LanceError(f"recipe {recipe.name}: '{pattern}' matches no module of this checkpoint")
        if scheme is not None:
            raise LanceError(
                f"recipe {recipe.name}: '{pattern}' matches '{other}', which is neither a linear layer nor an "
                "embedding: no other weights are quantized"
            )


RECIPES = {
    "8bit": Recipe("8bit", Scheme(8, 64)),
    # By sizes alone: 4 bits, whose errors are ten times those of 8, where most of the weights are, but not in
    # down_proj, which quantized poorly in other models.
    "small": Recipe(
        "small", Scheme(8, 64), tuple((f"{_LAYERS}.mlp*.{kind}_proj", Scheme(4, 64)) for kind in ("gate", "up"))
    ),
}
"""Recipes by name."""
_CHOICES = f"{', '.join(RECIPES)}, or a JSON file with a recipe"


def recipe_of(
    bits: int | None = None, predicate: str | None = None, group_size: int | None = None, mode: str = "affine"
) -> Recipe:
    """What the options of the commands say.

    Args:
        bits, group_size, mode: those of the default recipe; the mode's own where None.
        predicate: a name in RECIPES, or a file.

    Raises:
        LanceError: they contradict each other, or there is no such recipe.
    """
    if predicate is None:
        scheme = Scheme.of(bits, group_size, mode)
        return Recipe(scheme.bits if scheme == Scheme.of(bits) else str(scheme), scheme)
    if (bits, group_size, mode) != (None, None, "affine"):
        raise LanceError(f"recipe {predicate} says bits, groups and mode itself: leave those options out")
    if predicate in RECIPES:
        return RECIPES[predicate]
    if Path(predicate).suffix != ".json" and not Path(predicate).exists():
        raise LanceError(f"there is no recipe '{predicate}': give {_CHOICES}")
    return Recipe.from_file(Path(predicate))


def stored_recipe(values: Mapping[str, Any], path: Path) -> Recipe | None:
    """What config.json says of how its checkpoint is quantized, None where it says nothing.

    Raises:
        LanceError: it is not as MLX writes it.
    """
    said = [values[key] for key in KEYS if key in values]
    if not said:
        return None
    if any(each != said[0] for each in said):
        raise LanceError(f"{path}: {' and '.join(KEYS)} contradict each other")
    if not isinstance(said[0], dict) or not {"bits", "group_size"} <= set(said[0]):
        raise LanceError(f"{path}: {KEYS[0]} needs bits and group_size, as MLX writes them: weights that other tools "
                         "quantized are not read")  # fmt: skip
    try:
        return Recipe.from_dict(str(path), said[0])
    except LanceError as error:
        raise LanceError(f"{path}: {KEYS[0]}: {error}") from None
