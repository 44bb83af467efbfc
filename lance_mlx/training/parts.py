"""Which of the model's own parameters are learned."""

from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from lance_mlx.model.lance import Lance

_EMBEDDINGS = ("language_model.model.embed_tokens", "language_model.lm_head")
_LANGUAGE_MODEL = "language_model"
_GENERATION = "_moe_gen"
_VIT = "vit_model"


@dataclass(frozen=True)
class Trained:
    """What full training changes; the defaults are those of upstream's scripts.

    Attributes:
        embeddings: the token embeddings and the output head.
        understanding: the language model's understanding expert.
        generation: its generation expert.
        drawing: what is around the language model for latents: their projections and the embedding of times.
    """

    embeddings: bool = False
    understanding: bool = True
    generation: bool = True
    drawing: bool = True

    def learns(self, path: str) -> bool:
        """Whether the module at a path is learned; the ViT never is."""
        if path.startswith(_EMBEDDINGS):
            return self.embeddings
        if path.startswith(_LANGUAGE_MODEL):
            return self.generation if _GENERATION in path else self.understanding
        return self.drawing and not path.startswith(_VIT)


def train_parts(model: Lance, trained: Trained) -> None:
    """Freeze all of a model but what is to be learned (bytedance/Lance train_utils.py:freeze_model_components)."""
    model.freeze()
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if trained.learns(path):
            module.unfreeze()
