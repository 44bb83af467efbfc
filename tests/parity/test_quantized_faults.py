"""Faults of quantized ports: each is found in a quantized run, at its place, and named."""

import json
from fnmatch import fnmatchcase

import pytest

from parity.bundle.reading import read_bundle
from parity.comparison.verdict import AGREE, DIVERGE
from parity.errors import ParityError
from parity.lance.faults import CATALOGUE
from parity.lance.faults.quantization import FAULTS, PACKED
from parity.lance.hypotheses import HYPOTHESES
from parity.lance.ports import MlxPort
from parity.lance.quantized import quantized_bundle
from parity.localize.investigation import Investigation, localize
from parity.oracle.oracle import Oracle

TOWERS = {"bits": 4, "group_size": 32, "*_moe_gen*": {"bits": 8, "group_size": 32}}
NAMED = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def quantized(oracles, alone, tmp_path_factory):
    """A bundle whose towers are quantized by a width of their own each, its oracle and lance_mlx with it."""
    recipe = tmp_path_factory.mktemp("recipe") / "towers.json"
    recipe.write_text(json.dumps(TOWERS))
    with alone(), quantized_bundle(oracles / "t2i-fp32-kv", str(recipe)) as path:
        bundle = read_bundle(path)
        yield bundle, Oracle.of(bundle), MlxPort(bundle)


def looked_into(quantized, *faults):
    bundle, oracle, port = quantized
    return Investigation(bundle, oracle, port, list(faults), HYPOTHESES, lambda what: None, thorough=False).run()


def test_nothing_is_found_where_nothing_is_wrong(quantized):
    found = looked_into(quantized)
    assert found.verdict == AGREE and not found.findings


@pytest.mark.parametrize("name", NAMED)
def test_a_fault_is_found_and_named(quantized, name):
    fault = CATALOGUE[name]
    assert fault.suits(quantized[0])
    found = looked_into(quantized, fault)
    assert found.verdict == DIVERGE and len(found.findings) == 1
    first = found.findings[0]
    assert fnmatchcase(first.component, fault.component)
    assert first.explanations[0].name == fault.explanation and first.explanations[0].residual_removed == 1


def test_what_breaks_packed_weights_asks_for_some(oracles, oracle_of, subject_of):
    bundle = oracle_of("t2i-fp32-kv").bundle
    for fault in FAULTS:
        assert fault.suits(bundle) == (fault.needs is not PACKED)
        if fault.needs is PACKED:
            with pytest.raises(ParityError, match="add --quantize"), subject_of("t2i-fp32-kv").broken_by([fault]):
                pass


@pytest.mark.exhaustive
def test_a_fault_of_one_row_alone_is_found_where_rows_are_single(oracles, alone, tmp_path, monkeypatch):
    """Weights that are right, multiplied wrongly when they are packed."""
    from lance_mlx.model import quantized as module

    def wrong(*given, **how):
        return 1.05 * right(*given, **how)

    right = module.mx.quantized_matmul
    with alone(), quantized_bundle(oracles / "x2t_image-bf16-kv", "8") as path:
        monkeypatch.setattr(module.mx, "quantized_matmul", wrong)
        found = localize(path, "mlx")
    assert found.verdict == DIVERGE and ".decode0/" in found.findings[0].tap
