"""Sees that every rank of a run is alive: MLX's collectives wait for one that is not, for ever.

Rank 0 has a connection to each of the others. Every rank sends a beat a second; one whose connection closes before it
said that it is done, or that sends nothing for long, is lost, and rank 0 tells the others.
"""

import _thread
import os
import selectors
import socket
import struct
import sys
import threading
import time
from contextlib import suppress

STATUS = 75
"""Exit status of a rank that another one is missing to: the system's EX_TEMPFAIL, try again."""
STALL_VARIABLE = "LANCE_MLX_STALL_SECONDS"
_STALL = 60.0
_JOIN = 300.0
"""Seconds in which all ranks have to come: they may import libraries from a slow disk."""
_BEAT = 1.0
_OWN_REASON, _GRACE = 2.0, 5.0
"""Seconds for a rank's own error, which may be the same as that of the lost one, and for what it has to clean up."""
_HELLO = struct.Struct("!8sI")
_MAGIC = b"lancemlx"
# A message is two bytes: what, and about which rank.
_ALIVE, _DONE, _ENDED, _STALLED = b".qes"


class RankLost(KeyboardInterrupt):
    """Another rank has ended or stalled: this one ends as if it were interrupted."""


class Watch(threading.Thread):
    """The connections of one rank, and the thread that listens to them."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(name="watch over ranks", daemon=True)
        self.lost: str | None = None
        self._rank, self._size = rank, size
        self._stall = float(os.environ.get(STALL_VARIABLE, _STALL))
        self._told, self._closed = threading.Event(), threading.Event()
        self._asked = False
        self._peers: dict[int, socket.socket] = {}

    def meet(self, address: tuple[str, int]) -> None:
        """Wait until all ranks are there, and begin to listen.

        Args:
            address: host and port at which rank 0 listens.

        Raises:
            RankLost: a rank did not come; `lost` says which.
        """
        rank, size = self._rank, self._size
        until = time.monotonic() + max(_JOIN, self._stall)
        try:
            self._listen(address, until) if rank == 0 else self._connect(address, until)
        except OSError as error:
            where = f"{address[0]}:{address[1]}"
            missing = set(range(size)) - {0} - set(self._peers) if rank == 0 else {0}
            who = ", ".join(map(str, sorted(missing)))
            self.lost = f"rank {who} of {size} was not met at {where} ({error.strerror or error})"
            self.close()
            raise RankLost from None
        self.start()

    def _listen(self, address: tuple[str, int], until: float) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.create_server(address, family=family, backlog=self._size) as server:
            while len(self._peers) < self._size - 1:
                server.settimeout(max(0.1, until - time.monotonic()))
                peer, _ = server.accept()
                peer.settimeout(self._stall)
                with suppress(OSError, struct.error):
                    magic, rank = _HELLO.unpack(peer.recv(_HELLO.size, socket.MSG_WAITALL))
                    if magic == _MAGIC and 0 < rank < self._size and rank not in self._peers:
                        self._peers[rank] = peer
                        continue
                peer.close()
        self._send(_ALIVE, 0)

    def _connect(self, address: tuple[str, int], until: float) -> None:
        while True:
            try:
                peer = socket.create_connection(address, timeout=self._stall)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        self._peers[0] = peer
        peer.sendall(_HELLO.pack(_MAGIC, self._rank))
        # The first beat comes when all are there.
        peer.settimeout(max(0.1, until - time.monotonic()))
        if len(peer.recv(2, socket.MSG_WAITALL)) < 2:
            raise OSError("the connection was closed")

    def run(self) -> None:
        """Listen until this rank is done, or another is lost."""
        selector = selectors.DefaultSelector()
        heard, rests = {}, {}
        for rank, peer in self._peers.items():
            peer.settimeout(self._stall)
            selector.register(peer, selectors.EVENT_READ, rank)
            heard[rank], rests[rank] = time.monotonic(), b""
        sent = 0.0
        while not self._closed.is_set():
            for key, _ in selector.select(_BEAT):
                rank = key.data
                try:
                    received = key.fileobj.recv(4096)
                except OSError:
                    received = b""
                if not received:
                    return self._end(_ENDED, rank)
                heard[rank] = time.monotonic()
                received = rests[rank] + received
                rests[rank] = received[len(received) // 2 * 2 :]
                for what, about in zip(received[::2], received[1::2], strict=False):
                    if what == _DONE:
                        selector.unregister(key.fileobj)
                        del heard[rank]
                        break
                    if what in (_ENDED, _STALLED):
                        return self._end(what, about)
            now = time.monotonic()
            for rank, last in heard.items():
                if now - last > self._stall:
                    return self._end(_STALLED, rank)
            if now - sent >= _BEAT:
                sent = now
                self._send(_ALIVE, 0)

    def _send(self, what: int, about: int) -> None:
        for peer in self._peers.values():
            # One that is gone is told so by what is received.
            with suppress(OSError):
                peer.sendall(bytes((what, about)))

    def _end(self, what: int, rank: int) -> None:
        """A rank is lost: tell the others, interrupt this one, and end it where it cannot be."""
        if self._closed.wait(_OWN_REASON):
            return
        how = "has ended" if what == _ENDED else f"has not answered for {self._stall:g} s"
        self.lost = f"rank {rank} of {self._size} {how}"
        self._told.set()
        if self._rank == 0:
            self._send(what, rank)
        if not self._asked:
            _thread.interrupt_main()
        if not self._closed.wait(_GRACE):
            # It waits in a collective, and writes nothing.
            with suppress(Exception):
                sys.stdout.flush()
            os.write(2, f"lance-mlx: {self.lost}; interrupted, what was written before is kept\n".encode())
            os._exit(STATUS)

    def wait_lost(self) -> bool:
        """Whether a rank is lost, after a collective that failed; waits until that would be known. The caller ends this
        rank then, which nothing else interrupts."""
        self._asked = True
        return self._told.wait(self._stall + _GRACE)

    def done(self) -> None:
        """Tell the others that this rank ends as it should."""
        self._send(_DONE, self._rank)
        self.close()

    def close(self) -> None:
        """Part from the others, to which this rank has ended where it has not said that it is done."""
        self._closed.set()
        for peer in self._peers.values():
            with suppress(OSError):
                peer.close()
