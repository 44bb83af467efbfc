"""A quantized model as what is judged: its oracle is the reference with the dequantized weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from parity.bundle.reading import read_bundle
from parity.lance.packed import write_dequantized
from parity.lance.record import record_again


@contextmanager
def quantized_bundle(path: Path, what: str, progress: Callable[[str], None] | None = None) -> Iterator[Path]:
    """A bundle's request with its weights quantized, recorded anew from the reference with the dequantized ones, for as
    long as the context lasts.

    lance_mlx runs it with the packed weights; see parity.lance.packed.write_dequantized for `what` they are.

    Raises:
        ParityError: the bundle cannot be used, or not be quantized so.
    """
    bundle = read_bundle(path)
    label = f"q{what}" if what.isdecimal() else Path(what).stem
    with TemporaryDirectory(prefix="lance-parity-") as folder:
        root, media = Path(folder), bundle.path.parent / "media"
        if media.is_dir():
            (root / "media").symlink_to(media, target_is_directory=True)
        if progress:
            progress("dequantized weights")
        # A name of its own: the bundle's may be the checkpoint's.
        place = root / f"{bundle.checkpoint.name}-{label}"
        checkpoint = write_dequantized(place, bundle.checkpoint, bundle.variant, what, bundle.dtype)
        yield record_again(root / f"{bundle.name}-{label}", bundle, checkpoint, progress)
