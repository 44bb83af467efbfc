"""Frozen dataclasses to plain JSON values and back, with every type checked."""

from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from lance_mlx.errors import LanceError

Record = TypeVar("Record")
Choice = TypeVar("Choice", bound=StrEnum)


class Plain:
    """What a frozen dataclass inherits to become JSON values and to come from them."""

    def __repr__(self) -> str:
        """With the fields that are not at their defaults, texts cut off at 40 characters."""
        given = [(field, getattr(self, field.name)) for field in fields(self)]
        shown = [f"{field.name}={_short(value)}" for field, value in given if value != field.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from JSON values under the field names; raises LanceError for an unknown key or a bad value."""
        return from_plain(cls, values)


def from_plain(kind: type[Record], values: dict[str, Any]) -> Record:
    """Build a dataclass from JSON values under its field names.

    Raises:
        LanceError: a key is unknown or missing, or its value is of another type.
    """
    if not isinstance(values, dict):
        raise LanceError(f"{values!r} must be an object with the keys of a {kind.__name__.lower()}")
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise LanceError(f"unknown {kind.__name__.lower()} key '{unknown[0]}'")
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
    if missing:
        raise LanceError(f"the {kind.__name__.lower()} key '{missing[0]}' is missing")
    hints = get_type_hints(kind)
    return kind(**{name: _converted(name, value, hints[name]) for name, value in values.items()})


def set_enums(record: Any) -> None:
    """Let the fields of a frozen dataclass that are enums be given as strings; raises LanceError for unknown ones."""
    for name, hint in get_type_hints(type(record)).items():
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            object.__setattr__(record, name, as_enum(hint, name, getattr(record, name)))


def as_enum(kind: type[Choice], name: str, value: str) -> Choice:
    """A member by its value; raises LanceError, calling it by `name`, where there is none."""
    try:
        return kind(value)
    except ValueError:
        raise LanceError(f"{name} '{value}' is not supported: choose one of {', '.join(kind)}") from None


def _short(value: Any) -> str:
    if isinstance(value, StrEnum):
        return f"'{value}'"
    return repr(value if not isinstance(value, str) or len(value) <= 40 else f"{value[:39]}…")


def _converted(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, UnionType):
        if value is None and NoneType in get_args(hint):
            return None
        return _converted(name, value, next(kind for kind in get_args(hint) if kind is not NoneType))
    if get_origin(hint) is tuple:
        return _tuple(name, value, get_args(hint))
    if is_dataclass(hint):
        return from_plain(hint, vars(value) if isinstance(value, hint) else value)
    if issubclass(hint, StrEnum):
        return as_enum(hint, name, value)
    # JSON tells 1 from true, and 1 from 1.0 where only whole numbers serve.
    allowed = (int, float) if hint is float else hint
    too_long = hint is float and isinstance(value, int) and abs(value) > 2**53
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool) or too_long:
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[hint]
        raise LanceError(f"{name} must be {wanted}, not {value!r}")
    return value


def _tuple(name: str, value: Any, kinds: tuple) -> tuple:
    if not isinstance(value, list | tuple):
        raise LanceError(f"{name} must be a list, not {value!r}")
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise LanceError(f"{name} must hold {len(kinds)} values, not {len(value)}")
    repeated = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
    return tuple(_converted(name, item, kind) for item, kind in zip(value, repeated, strict=True))
