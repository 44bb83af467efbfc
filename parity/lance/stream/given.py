"""A port of the user's in a streamed comparison.

It holds its own weights, all of them, and runs the whole request: what is streamed is the reference, whose taps of the
step are then all in memory at once, since the port runs from them in one go. Everything else is judged as lance_mlx is.
"""

import time

from parity import memory
from parity.errors import ParityError, one_line
from parity.lance.stream.comparison import EMBEDDED, HEAD, Streamed, StreamRun, Tell
from parity.lance.stream.plan import StreamPlan
from parity.lance.stream.reference import Computed, ReferenceStream
from parity.localize.investigation import lacking
from parity.ports.port import Loader, Port
from parity.ports.process import ProcessPort
from parity.tensors.recording import Observed

RUNS = "the port"
"""The name of the part in which the port runs."""


def stream_given(plan: StreamPlan, load: Loader, tell: Tell | None = None) -> Streamed:
    """Compare one step of a port with the streamed reference's; see comparison.stream.

    Raises ParityError for a plan without a bundle, which a port is loaded for.
    """
    if plan.bundle is None:
        raise ParityError("a port of yours is loaded for a bundle: name one with --against")
    memory.reset_peak()
    started = time.perf_counter()
    port = load(plan.bundle)
    with one_line("the request cannot be streamed"):
        theirs = ReferenceStream(plan.checkpoint, plan.variant, plan.request, plan.numerics, plan.replay, plan.given)
        return _GivenRun(plan, theirs, tell or (lambda part, number, parts: None), port).run(started)


class _GivenRun(StreamRun):
    def __init__(self, plan: StreamPlan, theirs: ReferenceStream, tell: Tell, port: Port) -> None:
        super().__init__(plan, theirs, tell)
        self.port, self.impl = port, port.name

    def _compare(self) -> Observed:
        parts = self.theirs.layers + 3
        self.tell(EMBEDDED, 0, parts)
        computed: list[Computed] = [self.theirs.embed(self.theirs.vit())]
        for index in range(self.theirs.layers):
            self.tell(f"layers.{index}", index + 1, parts)
            computed += self.theirs.run_layer(index).values()
            memory.give_back()
        self.tell(HEAD, parts - 2, parts)
        computed.append(self.theirs.finish())
        expected = {name: tap for each in computed for name, tap in each.taps.items()}
        self.tell(RUNS, parts - 1, parts)
        steered = self.port.run(set(expected), expected, self.exact).filled(expected)
        try:
            free = self.port.run(set(expected)).filled(expected)
        except ParityError as error:
            self.failure, free = str(error), Observed({}, {}, {})
        for each in computed:
            self._note(each, steered.recording, free.recording)
        whose = "its own process holds" if isinstance(self.port, ProcessPort) else "with"
        said = [f"the peak is this process's: {whose} all weights of {self.impl}"]
        if lacks := lacking(expected, steered):
            said.append(f"judged on what {self.impl} shares with upstream: {lacks}")
        self.remark = "; ".join(said)
        return steered

    def _versions(self) -> dict[str, str]:
        return self.port.versions()
