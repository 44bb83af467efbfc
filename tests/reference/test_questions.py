"""Answering questions about visuals."""

import numpy as np
import pytest
import torch

from parity.lance.replay_torch import TorchReplay
from reference.errors import ReferenceError
from reference.layout import VisualSize
from reference.understanding import answer, build_reader


def tokens(pipeline, request, replay, entry):
    return TorchReplay(pipeline, request, entry, replay).record()["tokens"].array.tolist()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("text_template", [True, False])
def test_the_cache_changes_no_answer(pipeline, asked, count, text_template):
    request, replay = asked("x2t_image", count, text_template=text_template)
    short, long = (tokens(pipeline, request, replay, entry) for entry in ("kv_cache", "full_sequence"))
    assert len(short) == request.max_new_tokens and long[: len(short)] == short
    assert len(long) > len(short)


def test_the_full_sequence_fills_its_last_block(pipeline, asked):
    request, replay = asked("x2t_image")
    recording = TorchReplay(pipeline, request, "full_sequence", replay).record()
    asked_tokens = recording["ce_loss_indexes"].array[0] + 1
    assert (asked_tokens + len(recording["tokens"].array)) % 128 == 0


class Script:
    """A reader whose logits are written down."""

    name, prefixes = "cond", 2

    def __init__(self, likely: list[int], size: int) -> None:
        self.likely, self.size, self.calls = likely, size, []

    def prefill(self, index: int) -> None:
        self.calls.append(index)

    def logits(self, index: int, token: int) -> torch.Tensor:
        self.calls.append(token)
        logits = torch.zeros(self.size)
        logits[self.likely[index]] = 1
        logits[-1] = 2
        return logits


def test_answers_stop_at_the_end_and_skip_what_is_no_token(pipeline, asked):
    request, replay = asked("x2t_image")
    inputs = pipeline.inputs(pipeline.layout(request, [size_of(replay)]))
    end, vocabulary = pipeline.tokenizer.im_end, len(pipeline.tokenizer)
    script = Script([5, 6, end, 7], vocabulary + 1)
    assert list(answer(script, inputs, pipeline.tokenizer, 9)) == [5, 6, end]
    last = int(inputs.layout.text_ids[inputs.layout.answer - 1])
    assert script.calls == [0, 1, last, 5, 6]
    assert list(answer(Script([5, 6, 7], vocabulary + 1), inputs, pipeline.tokenizer, 2)) == [5, 6]


def size_of(replay):
    return VisualSize(vit=replay.vit_grids[0])


def test_decoding_runs_under_its_own_names(pipeline, asked):
    request, replay = asked("x2t_image")
    calls: list[str] = []
    recording = TorchReplay(pipeline, request, "kv_cache", replay).record(None, calls.append)
    count = len(recording["tokens"].array)
    prefills = [f"cond.prefill{i}" for i in range(3)]
    assert calls == ["vit_model0", *prefills, *(f"cond.decode{i}" for i in range(count))]
    positions = [recording[f"cond.decode{i}/position_ids"].array for i in range(count)]
    np.testing.assert_array_equal(np.diff([column[:, 0] for column in positions], axis=0), 1)
    assert not any(module._forward_hooks for module in pipeline.vit_model.modules())


def test_an_unknown_entry_is_named(pipeline, asked):
    request, replay = asked("x2t_image")
    inputs = pipeline.inputs(pipeline.layout(request, [size_of(replay)]))
    with pytest.raises(ReferenceError, match="entry 'cached'"):
        build_reader(inputs, pipeline.tokenizer, "cached", 4)
