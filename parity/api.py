"""Parity in Python: comparing any two runs, and asserting that they agree in anybody's tests."""

from parity.comparison.compare import Comparison, compare_runs
from parity.comparison.runs import Given
from parity.comparison.verdict import AGREE


def compare(
    a: Given,
    b: Given,
    *,
    within: float | None = None,
    check_dtype: bool | None = None,
    allow_missing: bool = False,
) -> Comparison:
    """Compare run `b` with run `a`, which is what is expected, tap by tap.

    Args:
        a, b: a mapping of names to arrays (NumPy, PyTorch or MLX; float32, bfloat16 or integers); the path of a bundle,
            of a safetensors file, or of what `lance-parity check --dump` wrote; or `BUNDLE@mlx`, `BUNDLE@reference`,
            `BUNDLE@mlx:float32`, the bundle's request replayed.
        within: largest relative L2 error of a tap. None: a bundle and its replay are judged by the bundle's floors, any
            other two by equality of every bit, and where that fails the verdict is inconclusive.
        check_dtype: whether float32 and bfloat16 are different; None: unless the runs' numerics are known to be.
        allow_missing: whether `b` may lack names that `a` has.

    Raises ParityError for a run that cannot be read or computed.
    """
    return compare_runs(a, b, within, check_dtype, allow_missing)


def assert_agrees(
    a: Given,
    b: Given,
    *,
    within: float | None = None,
    check_dtype: bool | None = None,
    allow_missing: bool = False,
) -> None:
    """Raise AssertionError, with the first divergence in its message, unless run `b` agrees with run `a`; see compare.

    An inconclusive comparison, and one of nothing, do not agree.
    """
    __tracebackhide__ = True
    compared = compare_runs(a, b, within, check_dtype, allow_missing)
    if compared.verdict != AGREE:
        raise AssertionError(compared.describe())
