"""lance-mlx convert: what it writes computes the same bits, and nothing half-written is ever left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors import safe_open

from lance_mlx import BFLOAT16, FLOAT32, LanceError, Request, Task, Variant, ViTSource, policy
from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.cli import main as command
from lance_mlx.pipeline import Pipeline, load

SHARD = 500_000


def converted(source: Path, variant: Variant, to: Path, dtype: str = "bfloat16", vit_source=ViTSource.LANCE) -> Path:
    """Convert to several shards."""
    prepare(str(source), find_checkpoint(source, variant), to, dtype, SHARD, vit_source).run(lambda *_: lambda _: None)
    return to


@pytest.fixture(scope="module")
def video(checkpoint, tmp_path_factory) -> Path:
    """The small video checkpoint in bfloat16."""
    return converted(checkpoint, Variant.VIDEO, tmp_path_factory.mktemp("converted") / "video")


def drawn(pipeline: Pipeline) -> np.ndarray:
    """Pixels of two steps from fixed noise."""
    request = Request(Task.T2V, "a red bird", height=32, width=48, num_frames=5, num_steps=2)
    noise = mx.random.normal((12, 48), key=mx.random.key(1))
    steps = list(pipeline.denoise(pipeline.prepare(request), noise))
    return np.concatenate([np.array(chunk) for chunk in pipeline.decode(request, steps[-1].x_next)])


def weights(pipeline: Pipeline) -> dict[str, mx.array]:
    """Every parameter of the model and of the VAE."""
    vae = {f"vae.{name}": array for name, array in tree_flatten(pipeline.vae.parameters())}
    return dict(tree_flatten(pipeline.model.parameters())) | vae


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", list(Variant))
def test_a_converted_checkpoint_computes_the_same_bits(checkpoint, tmp_path, variant, name):
    numerics = policy(name)
    path = converted(checkpoint, variant, tmp_path / "out", name)
    theirs, ours = (load(folder, variant, numerics, looks=True) for folder in (checkpoint, path))
    expected, found = weights(theirs), weights(ours)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == numerics.dtype and mx.array_equal(found[key], array), key
    assert np.array_equal(drawn(ours), drawn(theirs))


def test_a_float32_conversion_serves_both_policies_and_a_bfloat16_one_says_that_it_cannot(checkpoint, video, tmp_path):
    path = converted(checkpoint, Variant.VIDEO, tmp_path / "wide", "float32")
    assert np.array_equal(drawn(load(path, Variant.VIDEO, BFLOAT16)), drawn(load(video, Variant.VIDEO, BFLOAT16)))
    with pytest.raises(LanceError, match="rounded to bfloat16: ask for bfloat16, or convert"):
        load(video, Variant.VIDEO, FLOAT32)
    with pytest.raises(LanceError, match="rounded to bfloat16"):
        converted(video, Variant.VIDEO, tmp_path / "widened", "float32")


def test_every_tensor_is_reported_with_its_checksums(checkpoint, video):
    report = json.loads((video / "conversion_report.json").read_text())
    index = json.loads((video / "model.safetensors.index.json").read_text())
    assert report["tensors"].keys() == index["weight_map"].keys()
    assert len(set(index["weight_map"].values())) > 2
    with safe_open(checkpoint / "Lance_3B_Video" / "model.safetensors", "pt") as file:
        lance = {name: file.get_tensor(name) for name in file.keys() if "pos_embed" not in name}
    vae = torch.load(checkpoint / "Wan2.2_VAE.pth", weights_only=True)
    assert {entry["source"]["name"] for entry in report["tensors"].values()} == lance.keys() | vae.keys()
    total = 0
    for name, entry in report["tensors"].items():
        source, stored = entry["source"], entry["converted"]
        official = vae[source["name"]] if name.startswith("vae.") else lance[source["name"]]
        assert (source["shape"], source["dtype"]) == (list(official.shape), "float32")
        assert source["sha256"] == hashlib.sha256(official.contiguous().numpy()).hexdigest()
        with safe_open(video / stored["file"], "pt") as file:
            assert file.metadata() == {"format": "mlx"}
            tensor = file.get_tensor(name)
        assert (stored["shape"], tensor.dtype) == (list(tensor.shape), torch.bfloat16)
        assert stored["sha256"] == hashlib.sha256(tensor.view(torch.uint16).numpy()).hexdigest()
        total += tensor.nbytes
    assert index["metadata"]["total_size"] == total
    assert stored["file"] == max(index["weight_map"].values())
    assert not any("partial" in path.name or path.name.endswith("safetensors.json") for path in video.iterdir())


def test_the_vit_is_upstreams_choice_or_the_users(checkpoint, video, tmp_path):
    other = converted(checkpoint, Variant.VIDEO, tmp_path / "other", vit_source=ViTSource.VIT_FILE)
    for path, source in ((video, ViTSource.LANCE), (other, ViTSource.VIT_FILE)):
        ours, theirs = (load(p, Variant.VIDEO, BFLOAT16, True, source) for p in (path, checkpoint))
        name = "vit_model.blocks.0.attn.qkv.weight"
        assert mx.array_equal(weights(ours)[name], weights(theirs)[name])
        assert json.loads((path / "config.json").read_text())["vit_source"] == source
    with pytest.raises(LanceError, match="convert once more with lance-mlx convert --vit-source vit_file"):
        load(video, Variant.VIDEO, BFLOAT16, True, ViTSource.VIT_FILE)
    image = converted(checkpoint, Variant.IMAGE, tmp_path / "image")
    load(image, Variant.IMAGE, BFLOAT16, True, ViTSource.VIT_FILE)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("latent_config", {}, "'latent_config' is not what this version computes"),
        ("dtype", "float8", "'dtype' is 'float8'"),
        ("vae_config", {"decoder": {}, "encoder": {}}, "vae_config.decoder contradicts the tensors"),
        ("surprise", 1, "key 'surprise' is unknown"),
        ("vit_config", None, "key 'vit_config' is missing"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(video, tmp_path, key, value, line):
    for path in video.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((video / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(LanceError, match=line):
        load(tmp_path, Variant.VIDEO, BFLOAT16)


def test_a_missing_index_or_shard_is_named(video, tmp_path):
    for path in video.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model-00001-of-00006.safetensors").unlink()
    with pytest.raises(LanceError, match="model-00001-of-00006.safetensors is missing"):
        load(tmp_path, Variant.VIDEO, BFLOAT16)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(LanceError, match="index.json is missing: convert the checkpoint again"):
        load(tmp_path, Variant.VIDEO, BFLOAT16)


class TestStopping:
    """An interrupted conversion keeps what is finished, and nothing else."""

    @pytest.fixture
    def conversion(self, checkpoint, tmp_path):
        """To be run; nothing is there yet."""
        found = find_checkpoint(checkpoint, Variant.VIDEO)
        return prepare(str(checkpoint), found, tmp_path / "out", "bfloat16", SHARD, ViTSource.LANCE)

    def interrupt(self, conversion, after: int) -> None:
        seen = 0

        def progress(count: int) -> None:
            nonlocal seen
            seen += count
            if seen > after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            conversion.run(lambda total, done: progress)

    def test_it_goes_on_from_the_finished_shards(self, conversion, video):
        self.interrupt(conversion, 3_000_000)
        assert not conversion.destination.exists()
        finished = sorted(conversion.staging.glob("*.safetensors"))
        assert 1 < len(finished) < 6
        times = [path.stat().st_mtime_ns for path in finished]
        begun = []
        conversion.run(lambda total, done: begun.append((total, done)) or (lambda count: None))
        ((total, done),) = begun
        assert 0 < done < total
        assert [(conversion.destination / path.name).stat().st_mtime_ns for path in finished] == times
        assert not conversion.staging.exists()
        for path in video.iterdir():
            assert (conversion.destination / path.name).read_bytes() == path.read_bytes(), path.name

    def test_a_damaged_shard_is_written_again(self, conversion, video):
        self.interrupt(conversion, 3_000_000)
        shard = min(conversion.staging.glob("*.safetensors"))
        with shard.open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\1")
        conversion.run(lambda *_: lambda _: None)
        assert (conversion.destination / shard.name).read_bytes() == (video / shard.name).read_bytes()

    def test_other_options_start_afresh(self, conversion, checkpoint, tmp_path):
        self.interrupt(conversion, 3_000_000)
        converted(checkpoint, Variant.IMAGE, tmp_path / "out")
        load(tmp_path / "out", Variant.IMAGE, BFLOAT16)

    @pytest.mark.parametrize("file", ["model-00001-", "model-00003-"])
    def test_the_command_ends_with_130_and_says_whether_it_goes_on(
        self, checkpoint, tmp_path, monkeypatch, capsys, file
    ):
        given = ["convert", str(checkpoint), str(tmp_path / "out"), "--variant", "image", "--shard-size", "0.001"]
        monkeypatch.setattr(sys, "argv", ["lance-mlx", *given])

        def entry(output, before, name, after):
            if name.startswith(file):
                signal.raise_signal(signal.SIGINT)
            return {"converted": {"file": name, "sha256": after}}

        monkeypatch.setattr("lance_mlx.checkpoint.convert._entry", entry)
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 130
        begun = file != "model-00001-"
        assert ("the same command goes on from there" in capsys.readouterr().err) == begun
        assert [path.name for path in tmp_path.iterdir()] == [".out.converting"] * begun
        assert not list(tmp_path.rglob("*.partial"))


def spoil(path: Path, **arrays: mx.array) -> None:
    """Replace tensors of a safetensors file."""
    tensors = mx.load(str(path))
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors | {name.replace("__", "."): array for name, array in arrays.items()})


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def truncated(copy) -> None:
    path = copy.variant / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def not_a_number(copy) -> None:
    spoil(copy.variant / "model.safetensors", llm2vae__bias=mx.full(48, float("nan")))


def beyond_bfloat16(copy) -> None:
    spoil(copy.variant / "model.safetensors", llm2vae__bias=mx.full(48, 3.4e38))


def float64(copy) -> None:
    from safetensors.torch import load_file, save_file

    path = copy.variant / "model.safetensors"
    save_file(load_file(path) | {"llm2vae.bias": torch.zeros(48, dtype=torch.float64)}, path)


def hostile(copy) -> None:
    torch.save({"conv2.bias": Hostile()}, copy.path / "Wan2.2_VAE.pth")


def without_vit(copy) -> None:
    (copy.path / "Qwen2.5-VL-ViT" / "vit.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (truncated, "model.safetensors is not a readable safetensors file"),
        (not_a_number, "tensor 'llm2vae.bias' holds NaN or infinite values"),
        (beyond_bfloat16, "tensor 'llm2vae.bias' holds NaN or infinite values"),
        (float64, "tensor 'llm2vae.bias' is float64"),
        (hostile, "it names posix.mkdir, which is no tensor and was not run"),
        (without_vit, "vit.safetensors is missing"),
    ],
)
def test_damage_is_one_line_and_nothing_is_written(refused, checkpoint_copy, tmp_path, monkeypatch, damage, line):
    monkeypatch.chdir(tmp_path)
    damage(checkpoint_copy)
    assert line in refused("convert", checkpoint_copy.path, "out", "-Q")
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint", ".out.converting"}


def test_a_disk_that_is_or_gets_full_is_one_line(checkpoint, tmp_path, monkeypatch):
    found = find_checkpoint(checkpoint, Variant.IMAGE)
    conversion = prepare("it", found, tmp_path / "out", "bfloat16", SHARD, ViTSource.LANCE)
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("", (), {"free": 1000}))
    with pytest.raises(LanceError, match="0.0 GB free, 0.0 GB are needed: make room"):
        conversion.run(lambda *_: lambda _: None)
    assert not conversion.staging.exists()
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000,) * 2); "
    script += "from lance_mlx.cli.main import main; main()"
    arguments = ["convert", checkpoint, tmp_path / "cut", "--variant", "image", "-Q"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"lance-mlx: {tmp_path / 'cut'} cannot be written (File too large)\n"
    assert not (tmp_path / "cut").exists()


def test_the_command_converts_and_what_it_made_draws_the_same_file(run, refused, checkpoint, tmp_path):
    out = tmp_path / "lance"
    assert "holds both models: choose one with --variant" in refused("convert", checkpoint, out)
    done = run("convert", checkpoint, out, "--variant", "video", "--shard-size", "0.001")
    assert done.returncode == 0, done.stderr
    assert "Lance_3B_Video, 346 tensors, bfloat16, 0.00 GB in 3 files" in done.stdout
    assert "peak memory" in done.stdout
    assert "exists already" in refused("convert", checkpoint, out, "--variant", "video")
    assert "lance-mlx generate t2v" in (out / "README.md").read_text()
    options = ["--prompt", "a bird", "--width", 32, "--height", 32, "--num-frames", 5, "--steps", 2, "-Q"]
    for model in (checkpoint, out):
        assert run("generate", "t2v", "--model", model, *options, "-o", tmp_path / f"{model.name}.mp4").returncode == 0
    drawn = []
    for model in (checkpoint, out):
        with av.open(str(tmp_path / f"{model.name}.mp4")) as video:
            drawn.append(np.stack([frame.to_ndarray() for frame in video.decode(video=0)]))
    assert np.array_equal(*drawn)
    line = refused("generate", "t2i", "--model", out, "--prompt", "a", "-o", tmp_path / "a.png")
    assert "holds Lance_3B_Video and this needs Lance_3B" in line and "or ask for --variant video to use" in line
    picture = ["--prompt", "a bird", "--width", 32, "--height", 32, "--steps", 2, "-o", tmp_path / "a.png"]
    done = run("generate", "t2i", "--model", out, "--variant", "video", *picture)
    assert done.returncode == 0, done.stderr
