"""Checkpoints on the Hugging Face hub, kept in its cache."""

import re
import sys
from pathlib import Path

from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Variant
from lance_mlx.sequence.tokenizer import TOKENIZER_FILES

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(model: str) -> bool:
    """Whether a model is named as OWNER/NAME and no file or folder has that name."""
    return bool(_REPOSITORY.fullmatch(model)) and not Path(model).exists()


def fetch(repository: str, variant: Variant, quiet: bool = False) -> Path:
    """The folder of a repository in the hub's cache, with the files that one variant needs; they are fetched where they
    are missing or older than the hub's, and without a network the cache serves.

    Raises:
        LanceError: there is no such repository, or it can be neither reached nor found whole in the cache.
    """
    # Imported here because it takes longer to import than everything else.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    # A star stands for slashes too, so the other variant is left out by name.
    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", "*/config.json", "*llm_config.json", "*.pth"]
    wanted += [f"*{name}" for name in TOKENIZER_FILES]
    others = [f"{other}/*" for other in Variant if other is not variant]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=others))
    except RepositoryNotFoundError:
        raise LanceError(
            f"'{repository}' is neither a folder nor a repository that the hub shows: check the name, or log in with "
            "`hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise LanceError(
            f"the hub does not answer, and its cache does not hold all of {repository} that {variant} needs: connect "
            "or give a folder"
        ) from None
    except Exception as error:  # the client raises many kinds for what can go wrong on the way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LanceError(f"{repository} cannot be fetched ({reason})") from None
