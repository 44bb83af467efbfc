"""Python files of the user's: imported for what they define."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from parity.errors import ParityError, interrupted, said


def import_file(path: Path, holds: str) -> ModuleType:
    """Import a file; `holds` says in words what it is to define. Raises ParityError where there is none or it fails."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"_given_{path.stem}", path) if path.suffix == ".py" else None
    if not path.is_file() or spec is None or spec.loader is None:
        raise ParityError(f"there is no Python file {path}: name a .py file with {holds}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise failure(f"{path} cannot be imported", error, path) from error
    return module


def failure(what: str, error: BaseException, file: Path | None = None) -> ParityError:
    """A ParityError of one line about anything that a file of the user's raises; an interrupt stays one."""
    if interrupted(error):
        raise KeyboardInterrupt from error
    return ParityError(f"{what}: {said(error, file)}")
