"""The clone of bytedance/Lance that is captured from: what has to be there, and which commit it is at."""

from pathlib import Path

from parity.errors import ParityError
from parity.ports.provenance import commit_of

COMMIT = "4baeee086648996f6ab12e673cbe461b0b149997"
"""The commit that this project's facts about upstream, and its oracles, come from."""

NEEDED = (
    "inference_lance.py",
    "config/config_factory.py",
    "common/val/utils.py",
    "data/datasets_custom/validation_dataset.py",
    "data/transforms.py",
    "modeling/lance/lance.py",
    "modeling/lance/qwen2_navit.py",
    "modeling/vae/wan/model.py",
    "modeling/vae/wan/vae2_2.py",
    "modeling/vit/qwen2_5_vl_vit.py",
)


def check_clone(clone: Path) -> tuple[str | None, str | None]:
    """Return the commit of a clone, None where that is not known, and a warning where it is not COMMIT as it was.

    Raises ParityError for a folder that lacks a file of the launcher's.
    """
    if not clone.is_dir():
        raise ParityError(f"{clone} is not a folder: name a clone of https://github.com/bytedance/Lance")
    missing = [name for name in NEEDED if not (clone / name).is_file()]
    if missing:
        raise ParityError(f"{clone} is no clone of bytedance/Lance, or an incomplete one: it lacks {missing[0]}")
    commit = commit_of(clone)
    if commit is None:
        return None, f"{clone} does not tell its commit, as git's clones do: it may be other code than {COMMIT[:7]}"
    if commit != COMMIT:
        return commit, f"{clone} is at commit {commit[:7]}{commit[40:]}, not {COMMIT[:7]}: it may compute otherwise"
    return commit, None
