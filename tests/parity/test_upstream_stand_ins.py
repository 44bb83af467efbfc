"""What stands in for packages that upstream imports, against plain computations and our own preprocessing."""

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lance_mlx.media.preprocess import vae_pixels
from parity.lance.upstream import stand_ins
from parity.lance.upstream.namespace import Overlaid
from parity.lance.upstream.stand_ins import InterpolationMode, Normalize, RandomResizedCrop

sides = st.integers(1, 200)


def softmax_attention(q, k, v, allowed):
    """Attention in float64, every query over the keys it is allowed."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("new", "old", "causal"), [(5, 0, True), (5, 7, True), (5, 7, False), (1, 3, True)])
def test_attention_sees_all_that_went_before_and_itself_up_to_the_last_key(new, old, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(new, 4, 8), torch.randn(old + new, 2, 8), torch.randn(old + new, 2, 8)
    ends = torch.tensor([0, new], dtype=torch.int32), torch.tensor([0, old + new], dtype=torch.int32)
    got = stand_ins.attention(q, k, v, *ends, new, old + new, causal=causal)
    rows, columns = torch.arange(new)[:, None], torch.arange(old + new)
    allowed = columns <= rows + old if causal else torch.ones(new, old + new, dtype=torch.bool)
    torch.testing.assert_close(got.double(), softmax_attention(q, k, v, allowed), rtol=1e-5, atol=1e-6)


def test_attention_of_several_sequences_is_refused():
    x = torch.zeros(4, 1, 8)
    with pytest.raises(NotImplementedError, match="knows one sequence"):
        stand_ins.attention(x, x, x, torch.tensor([0, 2, 4]), torch.tensor([0, 2, 4]), 2, 2)


def test_masked_attention_follows_the_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)

    class Mask:
        mask_mod = staticmethod(lambda batch, head, row, column: (row >= column) | ((row >= 4) & (column >= 4)))

    got = stand_ins.masked_attention(q, k, v, block_mask=Mask, enable_gqa=True)[0].transpose(0, 1)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[4:, 4:] = True
    expected = softmax_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), allowed)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@given(width=sides, height=sides, ratio=st.sampled_from([21 / 9, 16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16]))
@settings(max_examples=60, deadline=None)
def test_a_crop_lies_within_the_picture_and_is_as_large_as_its_ratio_lets_it(width, height, ratio):
    left, top, w, h = RandomResizedCrop((16, 16), (1, 1), (ratio, ratio), InterpolationMode.BICUBIC).box(width, height)
    assert 0 <= left and 0 <= top and left + w <= width and top + h <= height
    # One side is the picture's but for rounding, and the other fits it.
    assert w >= width - 1 or h >= height - 1
    assert abs(w - h * ratio) <= 0.5 * (1 + ratio) + 1


def test_preprocessing_by_the_stand_ins_is_the_projects_own():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    ours = vae_pixels(pixels[None], 64)
    size = ours.shape[1:3]
    crop = RandomResizedCrop(size, (1, 1), (size[1] / size[0],) * 2, InterpolationMode.BICUBIC)
    tensor = stand_ins.to_tensor(crop(Image.fromarray(pixels)))[None]
    theirs = Normalize(0.5, 0.5)(stand_ins.center_crop(tensor, size))
    assert np.array_equal(theirs.numpy().transpose(0, 2, 3, 1), ours)


def test_normalize_takes_a_value_for_each_channel():
    values = Normalize([0.0, 1.0, 2.0], [1.0, 2.0, 4.0])(torch.full((2, 3, 1, 1), 4.0))
    assert values[1, :, 0, 0].tolist() == [4.0, 1.5, 0.5]


def test_a_video_gives_its_frames_by_number(tmp_path):
    path = str(tmp_path / "grey.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for level in range(0, 240, 40):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reader = stand_ins.VideoReader(path)
    assert len(reader) == 6 and reader.get_avg_fps() == 8
    frames = reader.get_batch([4, 1, 1]).asnumpy()
    assert [round(frame.mean() / 40) for frame in frames] == [4, 1, 1]


def test_what_is_absent_says_so_only_when_it_is_used():
    module = stand_ins.Absent("cv2", known=3)
    assert module.known == 3 and not hasattr(module, "__wrapped__")
    missing = module.Something
    with pytest.raises(NotImplementedError, match="cv2 is not installed, and its Something is needed"):
        missing(1)


def test_an_overlay_changes_its_own_names_alone():
    overlay = Overlaid(torch, bfloat16=torch.float32)
    assert overlay.bfloat16 is torch.float32 and torch.bfloat16 is not torch.float32
    assert overlay.zeros is torch.zeros and Overlaid(overlay, randn=3).bfloat16 is torch.float32
