"""What a bundle's request alone decides, as the reference lays it out."""

import os
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from parity.bundle.reading import Bundle
from parity.lance.given import replay_of
from parity.lance.names import parse
from parity.lance.record import IMPLEMENTATION
from parity.lance.replay_torch import replayed_sizes
from parity.tensors.recording import DTYPES, Replay
from reference.arms import CachedArm, Inputs
from reference.config import LanguageConfig
from reference.errors import ReferenceError
from reference.layout import Layout, Split, VisualSize
from reference.media import visual_sizes
from reference.preprocess import preprocess
from reference.prompt import Tokenizer
from reference.request import Request
from reference.sampler import is_guided, time_grid
from reference.sequence import build_layout


class DerivedRequest:
    """A bundle with the sequence and the schedule of its request; raises ReferenceError for one that has none."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.taps = bundle, bundle.taps
        self.request = Request.from_dict(bundle.request)
        self.replay: Replay = replay_of(bundle)
        folder = bundle.checkpoint / bundle.variant
        self.config = LanguageConfig.from_file(folder / "llm_config.json")
        self.tokenizer = Tokenizer(folder)

    @property
    def recorded(self) -> bool:
        """Whether lance-parity recorded the bundle."""
        return self.bundle.manifest["source"].get("implementation") == IMPLEMENTATION

    @cached_property
    def given(self) -> list[VisualSize]:
        """Sizes of the visuals as the bundle holds them."""
        return replayed_sizes(self.request, self.replay)

    @cached_property
    def media(self) -> list[VisualSize] | str | None:
        """Sizes that the files of the visuals make; why they make none, or None where there are no files."""
        root = self.bundle.path.parent
        paths = [root / element.content for element in self.request.visuals]
        if not paths or not all(map(os.path.isfile, paths)):
            return None
        try:
            if self.recorded:
                # The reference turns photos and videos upright, upstream does not.
                return [visual.size for visual in preprocess(self.request, root)]
            return visual_sizes(self.request, root)
        except ReferenceError as error:
            return str(error)

    @cached_property
    def layout(self) -> Layout:
        """The sequence, for visuals of the sizes that their files make, or else the bundle holds."""
        sizes = self.media if isinstance(self.media, list) else self.given
        return build_layout(self.request, self.tokenizer, sizes, self.config.tokens_per_second)

    @cached_property
    def inputs(self) -> Inputs:
        """The sequence as the reference's arms read it, without a model."""
        return Inputs(None, self.layout, None, torch.device("cpu"))

    @cached_property
    def times(self) -> Tensor:
        """t at every step's start, and 0."""
        return time_grid(self.request.num_steps, self.request.timestep_shift)

    @cached_property
    def guided(self) -> list[bool]:
        """Whether each step is guided."""
        return [self.request.guided and is_guided(t, *self.request.cfg_interval) for t in self.times[:-1]]

    def tensor(self, name: str) -> Tensor | None:
        """A tap in the dtype that it was computed in."""
        tap = self.taps.get(name)
        return None if tap is None else torch.from_numpy(tap.array).to(DTYPES[tap.dtype])

    def splits(self, arm: str) -> list[Split]:
        """The splits of an arm's prefix."""
        if arm == "cond":
            return self.layout.prefix
        return CachedArm(arm, self.inputs, None).splits

    def rows(self, call: str) -> Tensor | None:
        """Which tokens of the sequence a call runs; None for tokens of an answer."""
        tap = parse(f"{call}/hidden_in")
        if "index" in tap.numbers:
            splits = self.splits(tap.arm)
            return self.inputs.rows_of(splits[tap.numbers["index"]]) if tap.numbers["index"] < len(splits) else None
        return None if ".decode" in call else self.inputs.rows_of(self.layout.target)

    def position_ids(self, call: str) -> np.ndarray | None:
        """The rotary ids int32 [3, n] of a call's tokens, None for a call that the request does not have."""
        tap = parse(f"{call}/position_ids")
        if ".decode" in call:
            step = tap.numbers["step"]
            return self.layout.continued_position_ids(step)[:, self.layout.answer - 1 + step :][:, :1]
        rows = self.rows(call)
        if rows is None:
            return None
        if ".step" in call:
            return CachedArm(tap.arm, self.inputs, None).position_ids.numpy()
        return self.inputs.position_ids[:, rows].numpy()
