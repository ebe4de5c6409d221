"""What prune_checkpoint() refuses: says which file and what to do, before anything is written."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
from pruning.checkpoints import edit_config, plan_for, save_tiny, snapshot


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    model = save_tiny(folder / "src", shard_bytes="60KB")
    return folder / "src", plan_for(model.config)


@pytest.fixture
def source(original, tmp_path):
    """A copy that a test may damage, and its plan."""
    shutil.copytree(original[0], tmp_path / "src")
    return tmp_path / "src", original[1]


def refused(source, kind=ValueError, match="", dst=None, **options):
    """The error of a call that must change nothing at all."""
    folder, plan = source
    before = snapshot(folder.parent)
    with pytest.raises(kind, match=match) as caught:
        prune_checkpoint(folder, dst or folder.parent / "dst", plan, progress=False, **options)
    assert snapshot(folder.parent) == before
    assert not (folder.parent / "dst").exists() and not (folder.parent / ".dst.partial").exists()
    return caught.value


def edit_tensors(folder, change, file="model-00002*"):
    """Rewrites one shard, and the index to fit it."""
    path = next(folder.glob(file))
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != path.name}
    index["weight_map"].update(dict.fromkeys(tensors, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_an_unknown_tensor(source):
    path = edit_tensors(
        source[0], lambda t: {**t, "model.layers.1.mlp.down_proj.weight_scale": torch.ones(1)}
    )
    refused(source, match=rf"{path.name}.*weight_scale': no parameter of .*leave_out")


def test_a_missing_tensor(source):
    def without_first(tensors):
        return dict(list(tensors.items())[2:])

    edit_tensors(source[0], without_first)
    refused(
        source,
        match=r"lacks 'model\.layers\.[^,]*', 'model\.layers\.[^,]*', which a llama model of the plan's",
    )


def test_a_tensor_of_another_shape(source):
    names = []

    def narrower(tensors):
        names.append(next(n for n in tensors if "proj.weight" in n))
        return {**tensors, names[0]: tensors[names[0]][:, :-1]}

    path = edit_tensors(source[0], narrower)
    refused(source, match=rf"{path.name}: {names[0]} has shape .* and the plan is for shape")


def test_a_doubled_tensor(source):
    first, second = sorted(source[0].glob("model-*.safetensors"))[:2]
    one = next(iter(load_file(first).items()))
    save_file({**load_file(second), one[0]: one[1]}, second, {"format": "pt"})
    refused(source, match=rf"{second.name}: holds '{one[0]}', and so does {first.name}")


def test_experts_in_both_ways(tmp_path):
    """Stacked and one by one at once would become the same parameter of the same model."""
    model = save_tiny(tmp_path / "src", "mixtral")
    path = tmp_path / "src" / "model.safetensors"
    stacked = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file({**load_file(path), **stacked}, path, {"format": "pt"})
    refused((tmp_path / "src", plan_for(model.config)), match="no parameter of")


@pytest.mark.parametrize("cut", [1, 1000, 10**9])
def test_a_truncated_shard(source, cut):
    path = next(source[0].glob("model-00002*"))
    os.truncate(path, max(0, path.stat().st_size - cut))
    refused(source, match=rf"{path.name}: .*get it again")


def test_a_missing_shard(source):
    path = next(source[0].glob("model-00002*"))
    path.unlink()
    refused(source, match=rf"{path.name}: cannot be opened: No such file")


def test_an_index_that_points_out(source):
    path = source[0] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../dst/model.safetensors"
    path.write_text(json.dumps(index))
    refused(source, match=r"index\.json: .*own folder")


def test_only_pickled_weights(source):
    for path in source[0].glob("model*safetensors*"):
        path.unlink()
    refused(source, match=r"only pytorch_model\.bin.*save_pretrained")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .* the checkpoint it was made from"),
        ({"model_type": "mistral"}, "model_type is mistral, the plan is for llama"),
        ({"model_type": "bert"}, "config.model_type 'bert' is not supported"),
        ({"hidden_size": 64, "num_hidden_layers": 4}, r"hidden is 64 \(plan: 48\), layers is 4 \(plan: 3\)"),
        ({"compression_config": {"bits": 4}}, "quantised .compression_config"),
        ({"quantization": {"bits": 4}}, "quantised .quantization"),
        ({"hidden_size": float("nan")}, "NaN"),
        ({"hidden_size": float("inf")}, "infinity"),
        ({"num_attention_heads": None}, "transformers refuses the config .* number of attention heads"),
        ({"num_attention_heads": 0, "head_dim": None}, "zero"),
        ({"hidden_size": [48]}, "int"),
        ({"model_type": ["llama"]}, "unhashable|must be one of"),
    ],
)
def test_a_config_that_does_not_fit(source, changes, match):
    edit_config(source[0], **changes)
    error = refused(source, match=match)
    assert str(error).startswith(str(source[0] / "config.json"))


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"model_type": "llama", "model_type": "llama"}'])
def test_a_config_that_is_none(source, text):
    path = source[0] / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    refused(source, match=r"config\.json: (cannot be opened|is not proper JSON|holds JSON, but not)")


def test_a_plan_of_another_kind(source):
    refused((source[0], {"hidden": [1]}), TypeError, "plan must be a PruningPlan")


def test_there_is_no_source(source, tmp_path):
    for path in (tmp_path / "nothing", source[0] / "config.json"):
        with pytest.raises(FileNotFoundError, match="src must be the folder of a checkpoint"):
            prune_checkpoint(path, tmp_path / "dst", source[1])


@pytest.mark.parametrize("dst", [".", "inside", "..", "../src"])
def test_source_and_target_apart(source, dst):
    refused(source, match="dst must be neither src, nor inside it, nor around it", dst=source[0] / dst)


def test_a_target_that_leads_into_the_source(source, tmp_path):
    (tmp_path / "link").symlink_to(source[0])
    refused(source, match="dst must be neither src", dst=tmp_path / "link" / "x")


@pytest.mark.parametrize(
    "options", [{"max_shard_bytes": 0}, {"threads": 0}, {"threads": True}, {"threads": 1.5}]
)
def test_numbers_that_are_none(source, options):
    refused(source, match=f"{next(iter(options))} must be a positive int", **options)


def test_too_little_space_is_known_before(source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    error = refused(source, OSError, r"needs 0\.02 GB of disk, and 0\.00 GB are free: free some")
    assert error.errno == errno.ENOSPC and error.filename.endswith(".dst.partial")


def test_a_target_that_cannot_be_written(source, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        error = refused(
            source, OSError, r"cannot be written to \(Read-only file system\): choose another dst"
        )
    assert error.errno == errno.EROFS and error.filename.endswith(".dst.partial")
    (source[0].parent / "file").write_text("x")
    refused(source, OSError, "cannot be written to", dst=source[0].parent / "file" / "dst")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_target_without_the_right(source, tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    refused(source, PermissionError, "cannot be written to", dst=tmp_path / "locked" / "dst")


@given(data=st.data())
def test_any_damage_to_the_headers_is_refused_or_harmless(original, tmp_path_factory, data):
    """Bytes of headers, index or config changed, cut or added: ValueError naming a file, or a result."""
    work = tmp_path_factory.mktemp("damaged")
    try:
        shutil.copytree(original[0], work / "src")
        choices = sorted(path.name for path in (work / "src").glob("*.*s*") if "model" in path.name)
        path = work / "src" / data.draw(st.sampled_from([*choices, "config.json"]))
        content = path.read_bytes()
        place = data.draw(st.integers(0, min(len(content), 4000)))
        noise = data.draw(st.binary(min_size=0, max_size=12))
        path.write_bytes(content[:place] + noise + content[place + data.draw(st.integers(0, 12)) :])
        try:
            prune_checkpoint(work / "src", work / "dst", original[1], progress=False, threads=1)
        except ValueError as error:
            assert type(error) is ValueError and str(work / "src") in str(error)
            assert not (work / "dst").exists() and not (work / ".dst.partial").exists()
        else:
            assert (work / "dst" / "config.json").is_file()
    finally:
        shutil.rmtree(work)
