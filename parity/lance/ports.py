"""The ports of Lance that are known by name: lance_mlx, and the reference itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import one_line
from parity.lance.faults import Fault, Target, combined
from parity.lance.given import replay_of
from parity.lance.packed import run_folder
from parity.lance.trusted import cut, load_run, unconditional_ids
from parity.oracle.oracle import Oracle
from parity.ports.port import Asked, Loader, Port, Weights, versions
from parity.tensors.recording import Observed, Tap
from reference.numerics import Numerics


class MlxPort(Port):
    """lance_mlx, loaded for a bundle.

    Attributes:
        pipeline: what a fault may break for a while.
    """

    name = "mlx"

    def __init__(self, bundle: Bundle) -> None:
        from parity.lance.replay_mlx import load_for, request_from_bundle

        self.bundle, self._replay = bundle, replay_of(bundle)
        with one_line(f"mlx cannot run bundle {bundle.name}"):
            self._asked = request_from_bundle(bundle.request, bundle.entry)
            self.pipeline = load_for(self._asked, run_folder(bundle.checkpoint, bundle.variant), bundle.dtype)

    def _run(self, asked: Asked) -> Observed:
        from parity.lance.replay_mlx import replay_pipeline

        how = asked.names, asked.progress, asked.force, asked.exact
        return replay_pipeline(self.pipeline, self._asked, self._replay, *how)

    def broken_by(self, faults: Sequence[Fault]) -> AbstractContextManager[object]:
        """A context in which faults break it."""
        return combined(faults)(Target(self.pipeline))

    def _weights(self) -> Weights:
        """The output head of a task that draws is never read."""
        from parity.lance.weights_mlx import named_weights

        yield from named_weights(self.pipeline, with_head=self._asked.task.answers)

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Port.with_weights."""
        from parity.lance.weights_mlx import replaced_weights

        with replaced_weights(self.pipeline, given):
            yield

    def _preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        from parity.lance.replay_mlx import preprocess_mlx

        return preprocess_mlx(self.bundle.request, self.bundle.entry, media)

    def versions(self) -> dict[str, str]:
        """See Port.versions."""
        return versions("mlx")


class ReferencePort(Port):
    """The PyTorch reference, loaded for a bundle; its weights are the ones compared with."""

    name = "reference"
    whole_passes = True

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        with one_line(f"reference cannot run bundle {bundle.name}"):
            self._reference = load_run(bundle, Numerics(bundle.dtype))

    def _run(self, asked: Asked) -> Observed:
        """`force` must hold the taps of the reference's own passes."""
        run, names = self._reference, asked.names
        # Of whole passes it is not known yet which of their parts are wanted.
        kept = names if run.entry == "kv_cache" else None
        recording = cut(run, run.record(kept, asked.progress, asked.force))
        layout = run.layout
        exact = {f"inputs/{name}": Tap(array, "int32") for name, array in layout.arrays().items()}
        if layout.answer is None:
            exact["inputs/position_ids.uncond"] = Tap(unconditional_ids(layout, run.entry), "int32")
        else:
            exact["inputs/position_ids.cond"] = Tap(layout.position_ids[:, : layout.answer], "int32")
        return Observed({name: tap for name, tap in recording.items() if name in names}, exact, {})

    def _weights(self) -> Weights:
        request = self._reference.request
        yield from reference_weights(self._reference.pipeline, request.understanding, bool(request.visuals))

    def _preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        from parity.lance.replay_torch import preprocess_reference

        return preprocess_reference(self._reference.request, media)

    def versions(self) -> dict[str, str]:
        """See Port.versions."""
        return versions("torch")


PORTS: dict[str, Loader] = {"mlx": MlxPort, "reference": ReferencePort}


def reference_weights(pipeline: Any, with_head: bool, with_vit: bool) -> Weights:
    """The reference's parameters, float32, under the checkpoint's names; the VAE's behind "vae."."""
    for name, parameter in pipeline.model.named_parameters():
        if with_head or not name.startswith("language_model.lm_head"):
            yield name, parameter.float().numpy()
    if with_vit:
        for name, parameter in pipeline.vit_model.named_parameters():
            yield f"vit_model.{name}", parameter.float().numpy()
    for name, parameter in pipeline.vae.named_parameters():
        if with_vit or not name.startswith(("encoder.", "conv1.")):
            yield f"vae.{name}", parameter.float().numpy()


def oracle_weights(oracle: Oracle) -> Weights:
    """The weights that an oracle's bundle was computed with."""
    request = oracle.run.request
    return reference_weights(oracle.run.pipeline, request.understanding, bool(request.visuals))
