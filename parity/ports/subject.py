"""What is under test: lance_mlx or the reference, loaded once for a bundle, run free, steered, or from given states."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError
from parity.oracle.oracle import Oracle, cut, load_run, unconditional_ids
from parity.ports.implementations import one_line, replay_of, versions
from parity.tensors.recording import Contract, Observed, Tap
from reference.numerics import Numerics

Weights = Iterator[tuple[str, np.ndarray]]


class Subject(Protocol):
    """An implementation with a bundle's checkpoint and request loaded."""

    name: str

    def run(
        self, names: set[str], force: Mapping[str, Tap] | None = None, contract: Contract | None = None
    ) -> Observed:
        """Replay the request, from the given values where there are some; raises ParityError when it cannot."""

    def steered(self, oracle: Oracle) -> Observed:
        """Replay the request with every part of it given what the oracle has before it."""

    def weights(self) -> Weights:
        """The parameters under the checkpoint's names, in PyTorch's layout, float32."""

    def with_weights(self, given: Mapping[str, np.ndarray]) -> Any:
        """A context in which these parameters hold the given values, in PyTorch's layout."""

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """The visuals as it resizes them itself, by the names of the bundles' inputs; None where it has no part."""

    def versions(self) -> dict[str, str]:
        """Names and versions of what computes."""


class MlxSubject:
    """lance_mlx, loaded for a bundle.

    Attributes:
        pipeline: what a fault may break for a while.
    """

    name = "mlx"

    def __init__(self, bundle: Bundle) -> None:
        from parity.lance.replay_mlx import load_for, request_from_bundle

        self._bundle, self._replay = bundle, replay_of(bundle)
        with one_line(f"mlx cannot run bundle {bundle.name}"):
            self._asked = request_from_bundle(bundle.request, bundle.entry)
            self.pipeline = load_for(self._asked, bundle.checkpoint / bundle.variant, bundle.dtype)

    def run(
        self, names: set[str], force: Mapping[str, Tap] | None = None, contract: Contract | None = None
    ) -> Observed:
        """See Subject.run."""
        from parity.lance.replay_mlx import replay_pipeline

        with one_line(f"mlx cannot run bundle {self._bundle.name}"):
            return replay_pipeline(self.pipeline, self._asked, self._replay, names, force=force, contract=contract)

    def steered(self, oracle: Oracle) -> Observed:
        """See Subject.steered."""
        return self.run(set(oracle.taps), oracle.taps, oracle.contract)

    def weights(self) -> Weights:
        """See Subject.weights; the output head of a task that draws is never read."""
        from parity.lance.weights_mlx import named_weights

        yield from named_weights(self.pipeline, with_head=self._asked.task.answers)

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Subject.with_weights."""
        from parity.lance.weights_mlx import replaced_weights

        with replaced_weights(self.pipeline, given):
            yield

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """See Subject.preprocessed."""
        from parity.lance.replay_mlx import preprocess_mlx

        with one_line(f"mlx cannot prepare the visuals of bundle {self._bundle.name}"):
            return preprocess_mlx(self._bundle.request, self._bundle.entry, media)

    def versions(self) -> dict[str, str]:
        """See Subject.versions."""
        return versions("mlx")


class ReferenceSubject:
    """The PyTorch reference, loaded for a bundle."""

    name = "reference"

    def __init__(self, bundle: Bundle) -> None:
        with one_line(f"reference cannot run bundle {bundle.name}"):
            self._run = load_run(bundle, Numerics(bundle.dtype))

    def run(
        self, names: set[str], force: Mapping[str, Tap] | None = None, contract: Contract | None = None
    ) -> Observed:
        """See Subject.run; `force` must hold the taps of the reference's own passes."""
        with one_line("reference cannot run the bundle"):
            recording = cut(self._run, self._run.record(force=force))
        layout = self._run.layout
        exact = {f"inputs/{name}": Tap(array, "int32") for name, array in layout.arrays().items()}
        if layout.answer is None:
            exact["inputs/position_ids.uncond"] = Tap(unconditional_ids(layout, self._run.entry), "int32")
        else:
            exact["inputs/position_ids.cond"] = Tap(layout.position_ids[:, : layout.answer], "int32")
        return Observed({name: tap for name, tap in recording.items() if name in names}, exact, {})

    def steered(self, oracle: Oracle) -> Observed:
        """See Subject.steered; its own passes are what it is given."""
        return self.run(set(oracle.taps), oracle.passes, oracle.contract)

    def weights(self) -> Weights:
        """See Subject.weights."""
        request = self._run.request
        yield from reference_weights(self._run.pipeline, request.understanding, bool(request.visuals))

    @contextmanager
    def with_weights(self, given: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See Subject.with_weights: the reference's are the ones compared with."""
        del given
        yield

    def preprocessed(self, media: Path) -> dict[str, np.ndarray] | None:
        """See Subject.preprocessed."""
        from parity.lance.replay_torch import preprocess_reference

        with one_line("reference cannot prepare the visuals of the bundle"):
            return preprocess_reference(self._run.request, media)

    def versions(self) -> dict[str, str]:
        """See Subject.versions."""
        return versions("torch")


SUBJECTS: dict[str, Callable[[Bundle], Subject]] = {"mlx": MlxSubject, "reference": ReferenceSubject}


def make_subject(name: str, bundle: Bundle) -> Subject:
    """Load an implementation for a bundle; raises ParityError for an unknown one."""
    if name not in SUBJECTS:
        raise ParityError(f"implementation {name!r} is not one of {', '.join(SUBJECTS)}")
    return SUBJECTS[name](bundle)


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
