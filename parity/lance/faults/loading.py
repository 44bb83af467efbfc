"""Faults by name, from a file of the user's, and several at once."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from pathlib import Path

from parity.errors import ParityError
from parity.lance.faults import (
    attention,
    embeddings,
    experts,
    guidance,
    layers,
    norms,
    positions,
    quantization,
    rope,
    sampling,
    sequence,
    vae_decoder,
    vae_encoder,
    vae_layers,
    vision,
    vision_attention,
    weights,
)
from parity.lance.faults.base import Fault, Patch, Target, together
from parity.python_file import failure, import_file

_MODULES = (
    sequence,
    positions,
    sampling,
    guidance,
    embeddings,
    norms,
    experts,
    rope,
    attention,
    layers,
    weights,
    quantization,
    vision,
    vision_attention,
    vae_encoder,
    vae_layers,
    vae_decoder,
)
CATALOGUE: dict[str, Fault] = {fault.name: fault for module in _MODULES for fault in module.FAULTS}
"""All faults by name, in the order of a run's stages."""


def load_fault(spec: str) -> Fault:
    """The fault of a name, or of FILE.py:NAME: a callable that is given the Target and returns a context manager.

    Raises:
        ParityError: there is no such fault, file or name, the file fails, or what it names is no patch; the last also
            when the fault is applied.
    """
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), name, spec)
    if spec not in CATALOGUE:
        close = get_close_matches(spec, CATALOGUE, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "name one of the catalogue, or FILE.py:NAME"
        raise ParityError(f"there is no fault {spec!r}: {hint}")
    return CATALOGUE[spec]


def combined(faults: Sequence[Fault]) -> Patch:
    """One patch that applies all faults in order."""
    return together(*(fault.patch for fault in faults))


def _from_file(path: Path, name: str, spec: str) -> Fault:
    value = vars(import_file(path, "faults, as FILE.py:NAME")).get(name)
    if value is None:
        raise ParityError(f"fault {spec}: {path} defines no {name or 'such name'}: name a function of it")
    if isinstance(value, Fault):
        return value
    if not callable(value):
        raise ParityError(
            f"fault {spec}: {name} is no function but a {type(value).__name__}: it must take the loaded model and "
            "return a context manager"
        )
    about = f"{(value.__doc__ or name).strip().splitlines()[0]}"
    return Fault(spec, about, "*", _checked(value, spec))


def _checked(patch: Callable[[Target], AbstractContextManager[object]], spec: str) -> Patch:
    """The user's patch; what goes wrong while it is applied or undone is a ParityError, what happens inside is not."""

    @contextmanager
    def apply(target: Target) -> Iterator[None]:
        try:
            context = patch(target)
        except Exception as error:
            raise failure(f"fault {spec} cannot be applied", error) from error
        if not isinstance(context, AbstractContextManager):
            raise ParityError(
                f"fault {spec} returned a {type(context).__name__}, which is no context manager: decorate a function "
                "that yields once with contextlib.contextmanager"
            )
        try:
            context.__enter__()
        except Exception as error:
            raise failure(f"fault {spec} cannot be applied", error) from error
        try:
            yield
        except BaseException:
            if not context.__exit__(*sys.exc_info()):
                raise
        else:
            try:
                context.__exit__(None, None, None)
            except Exception as error:
                raise failure(f"fault {spec} cannot be undone", error) from error

    return apply
