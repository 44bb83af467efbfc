"""The ports of Lance that are known by name: lance_mlx, and the reference itself."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import one_line
from parity.lance.faults import Fault, Target, combined
from parity.lance.given import replay_of
from parity.lance.trusted import cut, load_run, unconditional_ids
from parity.oracle.oracle import Oracle
from parity.ports.port import Loader, Progress, Weights, versions
from parity.tensors.recording import Contract, Observed, Tap
from reference.numerics import Numerics


class MlxPort:
    """lance_mlx, loaded for a bundle.

    Attributes:
        pipeline: what a fault may break for a while.
    """

    name = "mlx"
    partial = whole_passes = False

    def __init__(self, bundle: Bundle) -> None:
        from parity.lance.replay_mlx import load_for, request_from_bundle

        self._bundle, self._replay = bundle, replay_of(bundle)
        with one_line(f"mlx cannot run bundle {bundle.name}"):
            self._asked = request_from_bundle(bundle.request, bundle.entry)
            self.pipeline = load_for(self._asked, bundle.checkpoint / bundle.variant, bundle.dtype)

    def run(
        self,
        names: Container[str],
        force: Mapping[str, Tap] | None = None,
        contract: Contract | None = None,
        progress: Progress | None = None,
    ) -> Observed:
        """See Port.run."""
        from parity.lance.replay_mlx import replay_pipeline

        with one_line(f"mlx cannot run bundle {self._bundle.name}"):
            return replay_pipeline(self.pipeline, self._asked, self._replay, names, progress, force, contract)

    def broken_by(self, faults: Sequence[Fault]) -> AbstractContextManager[object]:
        """A context in which faults break it."""
        return combined(faults)(Target(self.pipeline))

    def weights(self) -> Weights:
        """See Port.weights; the output head of a task that draws is never read."""
        from parity.lance.weights_mlx import named_weights

        yield from named_weights(self.pipeline, with_head=self._asked.task.answers)

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Port.with_weights."""
        from parity.lance.weights_mlx import replaced_weights

        with replaced_weights(self.pipeline, given):
            yield

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """See Port.preprocessed."""
        from parity.lance.replay_mlx import preprocess_mlx

        with one_line(f"mlx cannot prepare the visuals of bundle {self._bundle.name}"):
            return preprocess_mlx(self._bundle.request, self._bundle.entry, media)

    def versions(self) -> dict[str, str]:
        """See Port.versions."""
        return versions("mlx")


class ReferencePort:
    """The PyTorch reference, loaded for a bundle."""

    name = "reference"
    partial, whole_passes = False, True

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle.name
        with one_line(f"reference cannot run bundle {bundle.name}"):
            self._run = load_run(bundle, Numerics(bundle.dtype))

    def run(
        self,
        names: Container[str],
        force: Mapping[str, Tap] | None = None,
        contract: Contract | None = None,
        progress: Progress | None = None,
    ) -> Observed:
        """See Port.run; `force` must hold the taps of the reference's own passes."""
        with one_line(f"reference cannot run bundle {self._bundle}"):
            # Of whole passes it is not known yet which of their parts are wanted.
            kept = names if self._run.entry == "kv_cache" else None
            recording = cut(self._run, self._run.record(kept, progress, force))
        layout = self._run.layout
        exact = {f"inputs/{name}": Tap(array, "int32") for name, array in layout.arrays().items()}
        if layout.answer is None:
            exact["inputs/position_ids.uncond"] = Tap(unconditional_ids(layout, self._run.entry), "int32")
        else:
            exact["inputs/position_ids.cond"] = Tap(layout.position_ids[:, : layout.answer], "int32")
        return Observed({name: tap for name, tap in recording.items() if name in names}, exact, {})

    def weights(self) -> Weights:
        """See Port.weights."""
        request = self._run.request
        yield from reference_weights(self._run.pipeline, request.understanding, bool(request.visuals))

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Port.with_weights: the reference's are the ones compared with."""
        del given
        yield

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """See Port.preprocessed."""
        from parity.lance.replay_torch import preprocess_reference

        with one_line("reference cannot prepare the visuals of the bundle"):
            return preprocess_reference(self._run.request, media)

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
