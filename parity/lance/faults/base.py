"""What a fault is, and the few ways in which one changes the loaded model until it ends."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.model.lance import Lance
from lance_mlx.model.vae import VAE
from lance_mlx.pipeline import Pipeline
from lance_mlx.sequence.tokenizer import LanceTokenizer
from parity.bundle.reading import Bundle

IMAGES = frozenset({"t2i", "image_edit"})
VIDEOS = frozenset({"t2v", "i2v", "video_edit"})
DRAWS = IMAGES | VIDEOS
EDITS = frozenset({"image_edit", "video_edit"})
ENCODES = EDITS | {"i2v"}
ASKS = frozenset({"x2t_image", "x2t_video"})
LOOKS = EDITS | ASKS
ALL = DRAWS | ASKS

FLOAT32 = ("float32",)
BFLOAT16 = ("bfloat16",)
KV_CACHE = ("kv_cache",)


class Target:
    """The loaded model that a fault is handed; any attribute but these three is the Lance model's.

    Attributes:
        pipeline: everything that is loaded; its transformer is `model`, its VAE `vae`.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @property
    def model(self) -> Lance:
        """The transformer with its embeddings, and the ViT where the task looks at pictures."""
        return self.pipeline.model

    @property
    def vae(self) -> VAE:
        """The VAE; its encoder is there where the task encodes pictures."""
        return self.pipeline.vae

    @property
    def tokenizer(self) -> LanceTokenizer:
        """The tokenizer of the checkpoint."""
        return self.pipeline.tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline.model, name)

    def modules(self, *patterns: str) -> dict[str, nn.Module]:
        """The modules whose component (checkpoint path, shortened) matches one of the fnmatch patterns, by component.

        The VAE's begin with "vae.". A pattern may match nothing: the checkpoint may lack what a task does not need.
        """
        named = [(_shortened(path), module) for path, module in self.model.named_modules() if path]
        named += [(f"vae.{path}", module) for path, module in self.vae.named_modules() if path]
        return {name: module for name, module in named if any(fnmatchcase(name, pattern) for pattern in patterns)}


Patch = Callable[[Target], AbstractContextManager[object]]
"""Given the loaded model, breaks it on entry and mends it on exit, also when an exception passes."""

Wrapper = Callable[..., Any]
"""Called in place of a function, with that function before its arguments."""


@dataclass(frozen=True)
class Need:
    """What a run must have for a fault to show in it: in words, and whether a bundle's run has it."""

    words: str
    met: Callable[[Bundle], bool] = field(repr=False)


@dataclass(frozen=True)
class Fault:
    """One way in which an implementation can be wrong, confined to one component.

    Attributes:
        name: unique, in kebab-case.
        about: one sentence: what an implementation with it does instead of what upstream does.
        component: fnmatch pattern of the component in which it shows first.
        patch: breaks the loaded model for the duration.
        tasks: launcher tasks in which it shows.
        dtypes: numerics policies in which it is more than rounding.
        entries: upstream's sampling functions in which it shows.
        explanation: what says what is wrong, a hypothesis's name or what does not vary of a law's sentence; None where
            nothing does.
        needs: what a run must have besides for the fault to show; None for nothing.
    """

    name: str
    about: str
    component: str
    patch: Patch = field(repr=False)
    tasks: frozenset[str] = ALL
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    entries: tuple[str, ...] = ("kv_cache", "full_sequence")
    explanation: str | None = None
    needs: Need | None = None

    def touches(self, task: str, dtype: str, entry: str) -> bool:
        """Whether the fault shows in such a run, provided that the run has what it needs."""
        return task in self.tasks and dtype in self.dtypes and entry in self.entries

    def suits(self, bundle: Bundle) -> bool:
        """Whether the fault shows in a bundle's run."""
        touched = self.touches(bundle.task, bundle.dtype, bundle.entry)
        return touched and (self.needs is None or self.needs.met(bundle))


def explained(
    name: str,
    component: str,
    explanation: str,
    patch: Patch,
    about: str,
    tasks: frozenset[str] = ALL,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    needs: Need | None = None,
) -> Fault:
    """A fault that is explained, its parts in the order in which a list of them reads best."""
    return Fault(name, about, component, patch, tasks, dtypes, explanation=explanation, needs=needs)


def rounded(x: mx.array) -> mx.array:
    """The values of `x` as bfloat16 has them, in the dtype of `x`."""
    return x.astype(mx.bfloat16).astype(x.dtype)


def tf32(x: mx.array) -> mx.array:
    """Float32 values as the units of a GPU read them that multiply in TF32: with 10 bits of mantissa."""
    bits = x.astype(mx.float32).view(mx.uint32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000).view(mx.float32)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a Python module, a class or an object another value until the context ends."""
    own = name in vars(owner)
    before = vars(owner)[name] if own else None
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def parameter(module: nn.Module, name: str, value: mx.array) -> Iterator[None]:
    """Give an array of a module another value until the context ends."""
    before = module[name]
    module[name] = value
    try:
        yield
    finally:
        module[name] = before


@contextmanager
def items(mapping: dict[str, Any], changed: Mapping[str, Any]) -> Iterator[None]:
    """Give some values of a dictionary others until the context ends; the keys must be there."""
    before = {key: mapping[key] for key in changed}
    mapping.update(changed)
    try:
        yield
    finally:
        mapping.update(before)


def wrapped(owner: Any, name: str, wrapper: Wrapper) -> AbstractContextManager[None]:
    """Call `wrapper(original, *arguments)` in place of a function or a method until the context ends."""
    original = getattr(owner, name)

    def call(*args: Any, **values: Any) -> Any:
        return wrapper(original, *args, **values)

    return replaced(owner, name, call)


@contextmanager
def everywhere(home: ModuleType, name: str, wrapper: Wrapper) -> Iterator[None]:
    """Wrap a function in its home and in all modules of lance_mlx and parity that imported it by name."""
    original = getattr(home, name)
    holders = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith(("lance_mlx.", "parity.")) and vars(module).get(name) is original
    ]

    def call(*args: Any, **values: Any) -> Any:
        return wrapper(original, *args, **values)

    with ExitStack() as stack:
        for holder in holders:
            stack.enter_context(replaced(holder, name, call))
        yield


def function(home: ModuleType, name: str, wrapper: Wrapper) -> Patch:
    """A patch that wraps a function wherever it is looked up."""
    return lambda target: everywhere(home, name, wrapper)


def method(kind: type, name: str, wrapper: Wrapper) -> Patch:
    """A patch that wraps a method of a class."""
    return lambda target: wrapped(kind, name, wrapper)


def calls(kind: type, wrapper: Wrapper, *patterns: str) -> Patch:
    """A patch that wraps what the modules of one class do, those whose components match."""

    def patch(target: Target) -> AbstractContextManager[None]:
        chosen = {id(module) for module in target.modules(*patterns).values()}

        def call(original: Callable[..., Any], module: nn.Module, *args: Any, **values: Any) -> Any:
            if id(module) in chosen:
                return wrapper(original, module, *args, **values)
            return original(module, *args, **values)

        return wrapped(kind, "__call__", call)

    return patch


def together(*patches: Patch) -> Patch:
    """One patch that applies several in order, and undoes them in the opposite one."""

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        with ExitStack() as stack:
            for each in patches:
                stack.enter_context(each(target))
            yield

    return patch


def _shortened(path: str) -> str:
    return path.removeprefix("language_model.").removeprefix("model.")
