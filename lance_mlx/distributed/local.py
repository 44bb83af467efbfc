"""Ranks on this machine, without mlx.launch: what each process is told of the others."""

import json
import socket
from contextlib import ExitStack
from pathlib import Path

_HERE = "127.0.0.1"


def local_ranks(count: int, folder: Path) -> list[dict[str, str]]:
    """The environment variables of so many processes of MLX's ring, which meet at free ports of this machine.

    Args:
        folder: where a file is written that they read when they begin.
    """
    first = _free_ports(count + 1)
    hosts = folder / f"ranks-{first}.json"
    hosts.write_text(json.dumps([[f"{_HERE}:{first + rank}"] for rank in range(count)]), encoding="utf-8")
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nothing listens at."""
    while True:
        with ExitStack() as held:
            first = held.enter_context(socket.create_server((_HERE, 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + count):
                    held.enter_context(socket.create_server((_HERE, port)))
            except (OSError, OverflowError):
                continue
            return first
