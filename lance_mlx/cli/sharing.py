"""What of a command's work is this process's, where mlx.launch started several."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import TypeVar

from lance_mlx.cli.console import Console
from lance_mlx.cli.drawing import Drawing
from lance_mlx.distributed.ranks import Ranks
from lance_mlx.distributed.split import Split, split_velocities
from lance_mlx.errors import LanceError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sharing:
    """How the ranks share a command's work; one process alone does all of it."""

    ranks: Ranks = Ranks()
    split: Split = Split.OUTPUTS

    @classmethod
    def of(cls, ranks: Ranks, split: Split | None, several: bool, answers: bool, guided: bool) -> "Sharing":
        """What is asked for, or what suits: outputs where there are several, else two ranks the arms of guidance, more
        the rows.

        Raises:
            LanceError: the split cannot be.
        """
        if split is not None and ranks.size == 1:
            raise LanceError("--split is for several processes: start them with mlx.launch -n N")
        if split is None:
            split = Split.GUIDANCE if ranks.size == 2 and guided else Split.ROWS
            if several or answers or ranks.size == 1:
                split = Split.OUTPUTS
        if split is not Split.OUTPUTS and answers:
            raise LanceError(f"--split {split} is of what is drawn: an answer is made by one process")
        if split is Split.GUIDANCE and not guided:
            raise LanceError("--split guidance needs two arms: give a --guidance above 1, or --split rows")
        split_velocities(split, ranks)
        return cls(ranks, split)

    @property
    def writes(self) -> bool:
        """Whether this process writes what it makes: of what all make together rank 0 does."""
        return self.split is Split.OUTPUTS or self.ranks.rank == 0

    def console(self, quiet: bool) -> Console:
        """The console of this process, which of what is made together shows nothing twice."""
        return Console(quiet or not self.writes)

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that this process has a part in."""
        return self.ranks.share(items) if self.split is Split.OUTPUTS else items

    def drawing(self, drawing: Drawing) -> Drawing:
        """It, without a file where another process writes it."""
        return drawing if self.writes else changed(drawing, path=None, steps=None)
