"""What bench.py counts seconds with, and the rate that it compares with."""

import time

import mlx.core as mx

from lance_mlx.backend.numerics import policy, runs_on_cpu


def clock() -> float:
    """Seconds of CPU time, or where MLX has a GPU of the clock."""
    return time.process_time() if runs_on_cpu() else time.perf_counter()


def product_rate(dtype: str) -> float:
    """GFLOP/s of a product: what a step can reach at most. On the CPU it is as wide as the official model's and in
    float32, in which all are computed there."""
    rows, width = (1024, 2048) if runs_on_cpu() else (8192, 8192)
    kind = mx.float32 if runs_on_cpu() else policy(dtype).dtype
    a, b = (mx.random.normal((n, width)).astype(kind) for n in (rows, width))
    mx.eval(a, b, a @ b)
    times = []
    for _ in range(5):
        start = clock()
        mx.eval(a @ b)
        times.append(clock() - start)
    return 2 * rows * width * width / min(times) / 1e9
