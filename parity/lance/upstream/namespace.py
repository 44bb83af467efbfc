"""A module that is another one but for some names: what one file of upstream's sees as `torch`, say."""

from types import ModuleType
from typing import Any


class Overlaid(ModuleType):
    """`module` with `given` names in place of its own."""

    def __init__(self, module: ModuleType, **given: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__["_module"] = module
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
