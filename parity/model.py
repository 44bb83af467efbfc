"""The model that the engine works on: what it asks of one is in a definition, which it never imports by itself."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def definition() -> ModuleType:
    """The definition of the model, whose names parity/lance/definition.py lists; imported when it is first asked."""
    return import_module("parity.lance.definition")
