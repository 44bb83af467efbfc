"""The parts that a streamed run reads one after the other, and the taps that belong to each."""

import re
from collections.abc import Container

EMBEDDINGS = ("language_model.model.embed_tokens", "vae2llm", "time_embedder")
"""What is read before the first layer."""
LAYER = "language_model.model.layers.{}"
"""The path of a layer."""
NORMS = ("language_model.model.norm", "language_model.model.norm_moe_gen")
VELOCITY, LOGITS = "llm2vae", "language_model.lm_head"
GUIDED = "sampler.velocity0"
_HEAD = re.compile(rf".+/(hidden_out|{'|'.join(map(re.escape, (*NORMS, VELOCITY, LOGITS)))})|{re.escape(GUIDED)}")


class _Head(Container[str]):
    """The names of what follows the last layer."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(_HEAD.fullmatch(name))


class Except(Container[str]):
    """All names but some."""

    def __init__(self, names: Container[str]) -> None:
        self._names = names

    def __contains__(self, name: object) -> bool:
        return name not in self._names


HEAD_TAPS = _Head()
"""The names of what follows the last layer."""


def head_parts(draws: bool) -> tuple[str, ...]:
    """What is read after the last layer of a task that draws, or answers."""
    return (*NORMS, VELOCITY if draws else LOGITS)
