"""What a run may learn from: folders of images and videos, and JSON Lines of every task."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lance_mlx import FLOAT32, Variant
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.errors import LanceError
from lance_mlx.pipeline import load
from lance_mlx.requests.request import Task
from lance_mlx.requests.visuals import prepare_visuals
from lance_mlx.sequence.segments import Role
from lance_mlx.training.data import read_data
from lance_mlx.training.encoded import Cache, Encoded, digests_of, encode, look
from lance_mlx.training.pack import CAPTION, VISUALS
from lance_mlx.training.settings import TrainSettings

ASKED = ["Look.", "what is it", "a clip"]
LINES = [
    (["a logo", "logo.png"], "text image", "01", {}),
    (["a clip", "clip.mp4"], "text video", "01", {}),
    (["a clip", "clip.mp4"], "text video", "01", {"task": "i2v"}),
    (["turn it", "phone.jpg", "logo.png"], "text image image", "001", {"id": 7}),
    (["both of them", "phone.jpg", "phone.jpg", "logo.png"], "text image image image", "0001", {"task": "subject"}),
    (["slower", "clip.mp4", "clip.mp4"], "text video video", "001", {}),
    (["phone.jpg", ASKED], "image text", "01", {}),
    (["clip.mp4", "a bird flies"], "video text", "01", {}),
]
TASKS = ["t2i", "t2v", "i2v", "image_edit", "subject", "video_edit", "x2t_image", "x2t_video"]


def line(elements, kinds, targets, more) -> str:
    entry = {"interleave_array": elements, "element_dtype_array": kinds.split()}
    return json.dumps(entry | {"istarget_in_interleave": [int(each) for each in targets]} | more)


@pytest.fixture(scope="module")
def folder(media, tmp_path_factory) -> Path:
    """Files, and data.jsonl with a line of every task that names them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("phone.jpg", "logo.png"):
        (folder / name).write_bytes((media / name).read_bytes())
    (folder / "clip.mp4").write_bytes((media / "clip23.mp4").read_bytes())
    (folder / "data.jsonl").write_text("\n\n".join(line(*each) for each in LINES) + "\n", encoding="utf-8-sig")
    return folder


@pytest.fixture(scope="module")
def encoded(folder, checkpoint, tmp_path_factory) -> Encoded:
    """All of it at 64 pixels, for the model that `pipeline` has."""
    examples, cache = read_data(folder / "data.jsonl"), tmp_path_factory.mktemp("cache")
    digests = digests_of(examples)
    latents, features = Cache(cache, ["vae"], digests), Cache(cache, ["vit"], digests)
    looking = load(checkpoint, Variant.VIDEO, FLOAT32, looks=True)
    encode(examples, latents, find_checkpoint(checkpoint, Variant.VIDEO).vae(), FLOAT32, 64)
    look(examples, features, looking.model, 56)
    return Encoded(tuple(examples), digests, latents, features)


def test_lines_are_of_the_tasks_that_their_elements_make(folder):
    examples = read_data(folder / "data.jsonl")
    assert [example.task for example in examples] == TASKS
    assert [len(example.encoded) for example in examples] == [1, 1, 1, 2, 3, 2, 0, 0]
    assert [len(example.looked_at) for example in examples] == [0, 0, 0, 1, 2, 1, 1, 1]
    assert examples[0].target.path == str(folder / "logo.png") and examples[3].where == f"{folder}/data.jsonl:7"
    question = examples[6].request
    assert [question.instruction, question.question, question.answer] == ASKED
    assert examples[7].request.answer == "a bird flies" and "video" in examples[7].request.instruction


def test_each_task_is_a_sample_of_its_own_size(encoded, pipeline):
    encoded.check()

    def sample(number, dropped=()):
        return encoded.sample(number, mx.random.key(1), pipeline.tokenizer, 2, mx.float32, dropped)

    samples = dict(zip(TASKS, map(sample, range(len(TASKS))), strict=True))
    assert samples["t2v"].noised == 3 * 15 and samples["i2v"].noised == 2 * 15 and samples["i2v"].clean.sum() == 15
    # The clean latents are the sources'.
    assert samples["image_edit"].clean.sum() == 15 and samples["subject"].clean.sum() == 30
    assert samples["video_edit"].clean.sum() == samples["video_edit"].noised == 45
    assert [len(each.vit) for each in samples.values()] == [0, 0, 0, 1, 2, 1, 1, 1]
    for task in ("x2t_image", "x2t_video"):
        answer = pipeline.tokenizer.decode(samples[task].labels.tolist())
        assert answer.startswith("a clip" if task == "x2t_image" else "a bird flies") and not samples[task].noised
    both = sample(TASKS.index("image_edit"), CAPTION | VISUALS)
    assert set(both.sequence.roles) == {Role.TEMPLATE, Role.NOISE} and both.vit == () and len(both.latents) == 1
    assert len(encoded.sample(6, mx.random.key(1), pipeline.tokenizer, 2, mx.float32, CAPTION | VISUALS).vit) == 1


def test_what_the_vit_saw_is_what_the_pipeline_sees(encoded, checkpoint, pipeline):
    looking = load(checkpoint, Variant.VIDEO, FLOAT32, looks=True)
    for number in (3, 7):
        request = encoded.examples[number].request
        (seen,) = looking.look(prepare_visuals(replace(request, vit_resolution=56)))
        sample = encoded.sample(number, mx.random.key(1), pipeline.tokenizer, 2, mx.float32)
        assert mx.array_equal(sample.vit[0], seen)


def test_a_file_of_all_tasks_trains_both_towers(invoke, checkpoint, folder, tmp_path):
    config = tmp_path / "config.json"
    settings = {"model": str(checkpoint), "data": str(folder / "data.jsonl"), "adapter_path": str(tmp_path / "a"),
                "resolution": 64, "vit_resolution": 56, "rank": 2, "iters": 2, "batch_size": 8, "learning_rate": 0.01,
                "numerics": "float32"}  # fmt: skip
    config.write_text(json.dumps(settings))
    done = invoke("train", "-c", config)
    assert done.returncode == 0, done.stderr
    assert "encoding: 3 files" in done.stderr and "looking: 2 files" in done.stderr
    moved = {name for name, array in load_file(tmp_path / "a" / "adapters.safetensors").items()
             if name.endswith("lora_b") and np.abs(array).max() > 1e-3}  # fmt: skip
    assert any("_moe_gen" in name for name in moved) and any("mlp.down_proj" in name for name in moved)
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert values["tower"] == "both" and values["variant"] == "video"
    lines = [json.loads(each) for each in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["latents"] > 150 and lines[0]["labels"] >= 10
    # Nothing is encoded or looked at again.
    done = invoke("train", "-c", config, "--resume", "--iters", 3)
    assert done.returncode == 0 and "encoding" not in done.stderr and "looking" not in done.stderr


def test_the_data_chooses_the_model_and_the_tower():
    settings = TrainSettings("m", "d")
    found = {task: settings.for_tasks({task}) for task in Task}
    assert found[Task.T2I].tower == found[Task.VIDEO_EDIT].tower == "generation"
    assert found[Task.X2T_IMAGE].tower == "understanding" and found[Task.X2T_IMAGE].variant == "image"
    assert found[Task.X2T_VIDEO].variant == found[Task.I2V].variant == "video"
    assert settings.for_tasks({Task.T2I, Task.X2T_IMAGE}).tower == "both"
    assert TrainSettings("m", "d", tower="both", variant="video").for_tasks({Task.T2I}).variant == "video"
    pairs = {512: 448, 768: 672, 480: 476, 640: 616, 64: 56, 20: 28}
    assert {key: TrainSettings("m", "d", resolution=key).looks_at for key in pairs} == pairs


def test_a_folder_holds_images_and_videos(media, tmp_path):
    for name in ("clip30.mp4", "phone.jpg"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
        (tmp_path / name).with_suffix(".txt").write_text(f"this is {name}")
    assert [example.task for example in read_data(tmp_path)] == ["t2v", "t2i"]


REFUSED = {
    "no json": ("{", "it is not JSON"),
    "no lists": ("[]", "a prompt or an object with interleave_array"),
    "no target": (line(["a", "a.png"], "text image", "00", {}), "marks 0 elements"),
    "two targets": (line(["a", "a.png"], "text image", "11", {}), "marks 2 elements"),
    "no such file": (line(["a", "b.png"], "text image", "01", {}), "b.png does not exist: paths are relative"),
    "no path": (line(["a", 3], "text image", "01", {}), "the image must be a path, not 3"),
    "no caption": (line([" ", "a.png"], "text image", "01", {}), "task t2i needs one text that is not empty"),
    "two captions": (line(["a", "b", "a.png"], "text text image", "001", {}), "task t2i needs one text"),
    "another task": (line(["a", "a.png"], "text image", "01", {"task": "t2v"}), "'task' is 't2v'"),
    "image and video": (line(["a", "a.png", "a.mp4"], "text image video", "001", {}), "to learn i2v, leave"),
    "no picture": (line([["i", "q", "a"]], "text", "1", {}), "a question needs an image or a video"),
    "no answer": (line(["a.png", ["i", "q", " "]], "image text", "01", {}), "the answer is empty"),
    "question beside": (line(["a.png", "q", "a"], "image text text", "001", {}), "[instruction, question, answer]"),
    "control token": (line(["<|video_pad|>", "a.png"], "text image", "01", {}), "control token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_that_cannot_be_learned_is_named(tmp_path, case):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.mp4").touch()
    text, said = REFUSED[case]
    (tmp_path / "d.jsonl").write_text(f"{line(['a', 'a.png'], 'text image', '01', {})}\n{text}\n")
    with pytest.raises(LanceError, match="^[^\n]*$") as refused:
        read_data(tmp_path / "d.jsonl")
    assert str(refused.value).startswith(f"{tmp_path / 'd.jsonl'}:2: ") and said in str(refused.value)


def test_a_file_that_cannot_be_read_is_named_with_its_line(refused, checkpoint, media, tmp_path):
    text = line(["a", str(media / "text.png")], "text image", "01", {})
    (tmp_path / "d.jsonl").write_text(text)
    said = refused("train", "--model", checkpoint, "--data", tmp_path / "d.jsonl", "--adapter-path", tmp_path / "a")
    assert f"{tmp_path / 'd.jsonl'}:1: image {media / 'text.png'} is in no format" in said
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(LanceError, match="holds no line"):
        read_data(tmp_path / "d.jsonl")
