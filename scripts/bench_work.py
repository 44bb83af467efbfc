"""What a case of bench.py times, and random weights for it."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


@dataclass(frozen=True)
class Work:
    """What is timed: `run` computes and evaluates; `operations` is how many it needs, None where not counted; `items`
    is how many things it makes, such as tokens; `whole` is whether its memory is that of the process, not MLX's,
    `remove` what has to be done when all is timed, and `plain` the same with nothing quantized, to be timed in turn."""

    run: Callable[[], object]
    operations: int | None = None
    items: int = 1
    whole: bool = False
    remove: Callable[[], object] = lambda: None
    plain: Callable[[], object] | None = None


def randomized(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Give a module weights that keep activations near unit size."""
    mx.random.seed(0)

    def draw(parameter: mx.array) -> mx.array:
        fan_in = parameter[0].size if parameter.ndim > 1 else 0
        values = mx.random.normal(parameter.shape) * fan_in**-0.5 if fan_in else mx.ones(parameter.shape)
        return values.astype(dtype)

    module.update(tree_map(draw, module.parameters()))
    mx.eval(module.parameters())
    return module
