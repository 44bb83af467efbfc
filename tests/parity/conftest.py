"""Bundles to damage, and an implementation that answers with the oracle's own taps."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from parity.bundle.reading import Bundle, read_bundle
from parity.lance.requests import SUPPORTED_TASKS
from parity.localize.findings import Localization
from parity.oracle.floors_file import FILE, floors_of, write_floors
from parity.oracle.oracle import Oracle
from parity.ports.loading import port_loader
from parity.ports.port import Port
from parity.tensors.recording import ExactInputs, Observed, Recording, Tap

ROOT = Path(__file__).parents[2]
ORACLES = ROOT / "oracles"
SHARED = ROOT.parent / "shared" / "oracles"
# All processes of a run measure into one folder, so that each bundle is measured once on a machine.
os.environ.setdefault("LANCE_PARITY_CACHE", str(ROOT / ".pytest_cache" / "floors"))

# The bundles are small: with more threads the processes of a parallel run only wait for each other.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `oracle` for the embedded bundles, and one of every other task of the shared ones.

    With `supported_oracle` the bundles of tasks that do not exist yet are left out, with `judged_oracle` those that are
    not embedded unless all is asked for: nothing is kept of what rounding does there, and measuring it takes a minute
    a bundle.
    """
    paths = {path.parent.name: path.parent for path in sorted(ORACLES.glob("*/manifest.json"))}
    for path in sorted(SHARED.glob("*/manifest.json")):
        if not any(name.partition("-")[0] == path.parent.name.partition("-")[0] for name in paths):
            paths[path.parent.name] = path.parent
    supported = {name: path for name, path in paths.items() if name.startswith(SUPPORTED_TASKS)}
    for fixture, found in (("oracle", paths), ("supported_oracle", supported), ("judged_oracle", supported)):
        if fixture in metafunc.fixturenames:
            slow = pytest.mark.exhaustive if fixture == "judged_oracle" else ()
            values = [pytest.param(path, id=name, marks=slow if path.parent != ORACLES else ())
                      for name, path in found.items()]  # fmt: skip
            metafunc.parametrize(fixture, values)


@dataclass
class ReplayedOracle:
    """Computes exactly what the oracle holds, but for `changed` taps and without the `dropped` ones."""

    name: str = "mlx"
    changed: dict[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    extra: Recording = field(default_factory=dict)

    partial = whole_passes = False
    bundle: Bundle | None = None

    def __call__(self, bundle: Bundle) -> "ReplayedOracle":
        self.bundle = bundle
        return self

    def run(
        self,
        names: Container[str],
        force: Mapping[str, Tap] | None = None,
        exact: ExactInputs | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Observed:
        if progress:
            progress("step0")
        recording: Recording = {}
        for name, tap in {**self.bundle.inputs, **self.bundle.taps, **self.extra}.items():
            if name not in self.dropped:
                change = self.changed.get(name, lambda array: array)
                recording[name] = Tap(change(tap.array.copy()), self.dtypes.get(name, tap.dtype))
        return Observed(recording, {}, {})

    def preprocessed(self, media: Path) -> None:
        """No visual is resized: what the bundle holds is taken."""
        return None

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}


@pytest.fixture(scope="session")
def alone() -> Callable[[], AbstractContextManager[None]]:
    """A context in which rounding is measured on this machine alone, for bundles that a test makes for itself.

    The processes of other processors' settings take most of the time; test_floors.py and test_measures.py have them.
    """

    @contextmanager
    def patched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("parity.oracle.floors.others", dict)
            yield

    return patched


@pytest.fixture
def replayed() -> type[ReplayedOracle]:
    """The implementation that answers with the oracle's own taps."""
    return ReplayedOracle


class Unsteady(ReplayedOracle):
    """Computes what a ReplayedOracle does, and one tap a little differently every time."""

    def __init__(self, tap: str, **values: object) -> None:
        super().__init__(**values)
        self.tap, self.runs = tap, 0

    def run(self, *args: object, **values: object) -> Observed:
        recording, self.runs = super().run(*args, **values).recording, self.runs + 1
        tap = recording[self.tap]
        changed = np.nextafter(tap.array, np.float32(np.inf if self.runs % 2 else -np.inf))
        return Observed(recording | {self.tap: Tap(changed, tap.dtype)}, {}, {})


@pytest.fixture
def unsteady() -> type[Unsteady]:
    """An implementation of which no two runs are alike."""
    return Unsteady


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The embedded bundles, read only."""
    return ORACLES


@cache
def floors_here(name: str) -> bytes:
    """The floors of an embedded bundle, pooled with this machine's: what was changed in a copy measures no others."""
    oracle = Oracle.of(read_bundle(ORACLES / name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        write_floors(path, oracle, floors_of(oracle))
        return path.read_bytes()


def copy_into(folder: Path, name: str, weights: bool | None = None) -> Path:
    """Copy an embedded bundle and its floors.

    `weights` True copies its checkpoint too, so that a test may change it; by default the weights are links, and with
    False there is only the config.
    """
    bundle = Path(shutil.copytree(ORACLES / name, folder / name))
    (bundle / FILE).write_bytes(floors_here(name))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    source, copied = ORACLES / manifest["checkpoint"], bundle.parent / manifest["checkpoint"]
    if weights is False:
        (copied / manifest["variant"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / manifest["variant"] / "llm_config.json", copied / manifest["variant"])
    elif not copied.exists():
        shutil.copytree(source, copied, copy_function=shutil.copy2 if weights else _copy_or_link)
    return bundle


def _copy_or_link(source: str, copied: str) -> None:
    if source.endswith((".safetensors", ".pth")):
        os.symlink(source, copied)
    else:
        shutil.copy2(source, copied)


@pytest.fixture
def copy_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Copies an embedded bundle into the test's own folder; see copy_into."""
    return partial(copy_into, tmp_path / "oracles")


@pytest.fixture(scope="module")
def linked_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copies an embedded bundle into a folder of the module's; its checkpoint, with all weights, is a link."""

    def copy(name: str) -> Path:
        folder = tmp_path_factory.mktemp("oracles")
        bundle = Path(shutil.copytree(ORACLES / name, folder / name))
        (bundle / FILE).write_bytes(floors_here(name))
        checkpoint = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["checkpoint"]
        (folder / checkpoint).symlink_to(ORACLES / checkpoint, target_is_directory=True)
        return bundle

    return copy


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[str], Oracle]:
    """The oracle of an embedded bundle, by its name; each is made once and must not be changed."""
    return cache(lambda name: Oracle.of(read_bundle(ORACLES / name)))


@pytest.fixture(scope="session")
def subject_of(oracle_of) -> Callable[..., Port]:
    """An implementation with an embedded bundle's request loaded; each is loaded once."""
    return cache(lambda name, impl="mlx": port_loader(impl)(oracle_of(name).bundle))


@pytest.fixture(scope="session")
def localized(oracle_of, subject_of) -> Callable[..., Localization]:
    """What an investigation of an embedded bundle finds, broken by faults or their names; each is made once."""
    from parity.lance.faults import CATALOGUE
    from parity.lance.hypotheses import HYPOTHESES
    from parity.localize.investigation import Investigation

    def run(name, *faults, impl="mlx", hypotheses=tuple(HYPOTHESES), subject=None, thorough=True):
        chosen = [CATALOGUE[fault] if isinstance(fault, str) else fault for fault in faults]
        oracle, subject = oracle_of(name), subject or subject_of(name, impl)
        parts = (oracle.bundle, oracle, subject, chosen, list(hypotheses), lambda what: None, thorough)
        return Investigation(*parts).run()

    return cache(run)


@pytest.fixture
def bundle(copy_bundle) -> Path:
    """A small float32 bundle that a test may damage; the weights of its checkpoint are links."""
    return copy_bundle("t2i-fp32-nokv")


@pytest.fixture
def detailed_bundle(copy_bundle) -> Path:
    """A float32 bundle with every layer's taps; the weights of its checkpoint are links."""
    return copy_bundle("t2i-fp32-kv")
