"""One rank of a RanksPort: python -m parity.lance.ranks.worker BUNDLE SPLIT FOLDER writes FOLDER/RANK.safetensors."""

import sys
from pathlib import Path

from lance_mlx.distributed.ranks import join, lost, told_how_it_ends
from lance_mlx.distributed.split import Split, split_velocities
from lance_mlx.distributed.watch import STATUS
from lance_mlx.errors import LanceError
from parity.bundle.reading import read_bundle
from parity.errors import ParityError
from parity.lance.ports import MlxPort
from parity.tensors.recording import write_tensors


class _Whole:
    """The names of taps that every rank has whole: none inside a step's pass over the latents."""

    def __contains__(self, name: object) -> bool:
        call, _, part = str(name).partition("/")
        return not (part and ".step" in call) and not call.startswith("velocity_call")


def main() -> None:
    """Replay a bundle together with the other ranks, and write what this one computed."""
    bundle, split, folder = read_bundle(Path(sys.argv[1])), Split(sys.argv[2]), Path(sys.argv[3])
    ranks = join()
    port = MlxPort(bundle)
    port.pipeline.split = split_velocities(split, ranks)
    observed = port.run(_Whole())
    write_tensors(folder / f"{ranks.rank}.safetensors", observed.recording | observed.exact)


if __name__ == "__main__":
    with told_how_it_ends():
        try:
            main()
        except KeyboardInterrupt:
            print(lost() or "interrupted", file=sys.stderr)
            sys.exit(STATUS)
        except (LanceError, ParityError) as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        sys.exit(0)
