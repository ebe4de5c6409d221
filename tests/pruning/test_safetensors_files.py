"""Headers and indices from elsewhere: read as the safetensors package does, or refused."""

import json
import os
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_kernels.pruning.checkpoint import safetensors_files
from minitron_kernels.pruning.checkpoint.safetensors_files import (
    DTYPES,
    INDEX_FILE,
    LONGEST_HEADER,
    SafetensorsFile,
    make_header,
    open_folder,
    read_json,
    torch_dtype,
)

TENSORS = {
    "a": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "b": torch.tensor(3.0),
    "c": torch.zeros(0, 5, dtype=torch.int64),
    "d": torch.tensor([True, False, True]),
}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
DATA_BYTES = 22


def write(path, header, data=bytes(DATA_BYTES), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def changed(**entries):
    return {**HEADER, **entries}


def tensor_of(file, stored):
    buffer = bytearray(stored.nbytes)
    file.read_into(memoryview(buffer), stored.begin)
    flat = torch.frombuffer(buffer, dtype=stored.dtype) if buffer else torch.empty(0, dtype=stored.dtype)
    return flat.view(stored.shape)


def test_reads_what_the_package_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = tensor_of(file, file.tensors[name])
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    file.close()


def test_the_package_reads_what_make_header_wrote(tmp_path):
    names = [name for name in DTYPES if name not in ("F8_E8M0",)]  # which the package's torch side lacks
    header, begins = make_header((name.lower(), name, (2, 3)) for name in names)
    body = b"".join(bytes(6 * DTYPES[name][1]) for name in names)
    (tmp_path / "x.safetensors").write_bytes(header + body)
    assert len(header) % 8 == 0 and begins[0] == len(header)
    with safe_open(tmp_path / "x.safetensors", "pt") as stream:
        assert stream.metadata() == {"format": "pt"}
        for name in names:
            assert stream.get_tensor(name.lower()).dtype == torch_dtype(name)
    SafetensorsFile(tmp_path / "x.safetensors").close()


def test_dtypes_have_torchs_sizes():
    assert {name: torch_dtype(name).itemsize for name in DTYPES} == {
        name: nbytes for name, (_, nbytes) in DTYPES.items()
    }


def first(text):
    return struct.pack("<Q", len(text)) + text


U8 = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
WRONG = {
    "empty": (b"", "too few"),
    "short": (b"\1\0\0", "too few"),
    "header beyond the file": (struct.pack("<Q", 10**6) + b"{}", "1000000 bytes"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "18446744073709551615"),
    "no JSON": (first(b"{\0\0}"), "proper JSON"),
    "no UTF-8": (first(b'{"\xff":1}'), "proper JSON"),
    "no object": (first(b"[]"), "not an object"),
    "deep": (first(b"[" * 100_000), "proper JSON"),
    "long number": (first(b'{"a":' + b"1" * 5000 + b"}"), "proper JSON"),
    "doubled name": (first(b'{"a":' + U8 + b',"a":' + U8 + b"}") + b"\0", "'a' is in it twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_none(tmp_path, case):
    content, message = WRONG[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value) and "get it again" in str(caught.value)


B = {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}
WRONG_HEADERS = {
    "metadata": (changed(__metadata__={"format": 1}), "__metadata__"),
    "metadata is a list": (changed(__metadata__=[]), "__metadata__"),
    "entry is a list": (changed(b=[]), "dtype, shape and data_offsets"),
    "entry lacks offsets": (changed(b={"dtype": "BF16", "shape": [3]}), "dtype, shape and data_offsets"),
    "unknown dtype": (changed(b={**B, "dtype": "F4"}), "'F4'"),
    "dtype is a list": (changed(b={**B, "dtype": ["F16"]}), "dtype"),
    "shape does not match": (changed(b={**B, "shape": [4]}), "6 bytes"),
    "dtype does not match": (changed(b={**B, "dtype": "F32"}), "6 bytes"),
    "shape is negative": (changed(b={**B, "shape": [-1, -3]}), "not a list of lengths"),
    "shape is a number": (changed(b={**B, "shape": 3}), "not a list of lengths"),
    "shape has a fraction": (changed(b={**B, "shape": [3.0]}), "not a list of lengths"),
    "shape is true": (changed(b={**B, "shape": [3, True]}), "not a list of lengths"),
    "huge shape": (changed(b={**B, "shape": [2**63, 2**63]}), "6 bytes"),
    "offsets backwards": (changed(b={**B, "data_offsets": [22, 16]}), "-6 bytes"),
    "offsets beyond the file": (changed(b={**B, "data_offsets": [17, 23]}), "gap"),
    "overlap": (changed(b={**B, "data_offsets": [14, 20]}), "overlaps"),
    "one offset": (changed(b={**B, "data_offsets": [16]}), "not two positions"),
    "a tensor less": ({"a": HEADER["a"]}, "describes"),
    "a tensor more": (changed(c={"dtype": "U8", "shape": [1], "data_offsets": [22, 23]}), "describes"),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_headers_that_lie(tmp_path, case):
    header, message = WRONG_HEADERS[case]
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [DATA_BYTES - 1, DATA_BYTES + 1, 0])
def test_a_file_cut_off_or_with_more_at_its_end(tmp_path, data):
    path = write(tmp_path / "x.safetensors", HEADER, bytes(data))
    with pytest.raises(ValueError, match="the file has"):
        SafetensorsFile(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing", "loop"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}
    make.get(kind, lambda: None)()
    with pytest.raises(ValueError, match=r"cannot be opened|not a regular file"):
        SafetensorsFile(path)


def test_errors_do_not_leak_files(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        with pytest.raises(ValueError):
            SafetensorsFile(write(tmp_path / f"{number}.safetensors", {"a": 1}))
    assert len(os.listdir("/proc/self/fd")) == before


# values that headers of attackers and of broken disks hold
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 40),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([*DTYPES, "F4", "../x"]),
    st.lists(st.integers(-1, 30), max_size=4),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), st.integers(0, 9)),
)


@given(st.data())
def test_a_mutated_header_is_read_or_refused(tmp_path_factory, data):
    """Whatever is put into a header, the answer is its tensors or a ValueError that names the file."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["a", "b", "c", "__metadata__", "\ud800"]))
        entry = header.get(name)
        if isinstance(entry, dict) and data.draw(st.booleans()):
            entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(ODD)
        else:
            header[name] = data.draw(ODD)
    text = json.dumps(header).encode()
    length = data.draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1)))
    path = write(tmp_path_factory.getbasetemp() / "mutated.safetensors", text, length=length)
    check_read_or_refused(path)


@given(st.binary(max_size=300), st.integers(0, 300))
@example(b"", 0)
def test_scrambled_bytes_are_read_or_refused(tmp_path_factory, noise, place):
    good = first(json.dumps(HEADER).encode()) + bytes(DATA_BYTES)
    path = tmp_path_factory.getbasetemp() / "scrambled.safetensors"
    path.write_bytes(good[:place] + noise + good[place + len(noise) // 2 :])
    check_read_or_refused(path)


def check_read_or_refused(path):
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        assert str(path) in str(error) and type(error) is ValueError and len(str(error)) < 1500
        return
    with safe_open(path, "pt") as stream:  # the package lets it through too, and reads the same
        assert set(stream.keys()) == set(file.tensors)
    for tensor in file.tensors.values():
        tensor_of(file, tensor)
    file.close()


def make_folder(path, files, weight_map=None):
    path.mkdir(exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, path / file)
    if weight_map is not None:
        (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


ONE, TWO = torch.ones(2), torch.ones(3)


def test_a_sharded_folder(tmp_path):
    files = {"1.safetensors": {"a": ONE}, "2.safetensors": {"b": TWO}}
    folder = make_folder(tmp_path / "m", files, {"b": "2.safetensors", "a": "1.safetensors"})
    with open_folder(folder) as source:
        assert {name: t.file.path.name for name, t in source.tensors.items()} == {
            "a": "1.safetensors",
            "b": "2.safetensors",
        }


def test_links_of_a_hub_cache_are_followed(tmp_path):
    blob = make_folder(tmp_path / "blobs", {"model.safetensors": {"a": ONE}}) / "model.safetensors"
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blob)
    with open_folder(folder) as source:
        assert set(source.tensors) == {"a"}


@pytest.mark.parametrize(
    "place",
    [
        *("../1.safetensors", "/tmp/1.safetensors", "sub/1.safetensors", "..\\1.safetensors", "..", ""),
        *("1.bin", "1.safetensors\0.safetensors", 3, None, ["1.safetensors"], {}),
    ],
)
def test_an_index_that_points_elsewhere(tmp_path, place):
    make_folder(tmp_path, {"1.safetensors": {"a": ONE}})
    folder = make_folder(tmp_path / "m", {"1.safetensors": {"a": ONE}}, {"a": place})
    with pytest.raises(ValueError, match="own folder") as caught, open_folder(folder):
        pass
    assert INDEX_FILE in str(caught.value)


F1, F2 = "1.safetensors", "2.safetensors"


@pytest.mark.parametrize(
    ("files", "weight_map", "message"),
    [
        ({F1: {"a": ONE}}, {"a": F1, "b": F1}, "lacks 'b'"),
        ({F1: {"a": ONE}}, {"a": F1, "b": F2}, "2.safetensors: cannot be opened"),
        ({F1: {"a": ONE}, F2: {"a": ONE, "b": TWO}}, {"a": F1, "b": F2}, "holds 'a', and so does 1.safe"),
        ({F1: {"a": ONE, "b": TWO}}, {"a": F1}, "'b', which model.safetensors.index.json says is nowhere"),
        ({F1: {"a": ONE}, F2: {"b": ONE}}, {"a": F2, "b": F1}, "says is in '2.safetensors'"),
        ({F1: {"a": ONE}}, {}, "no weight_map"),
        ({F1: {"a": ONE}}, [], "no weight_map"),
        ({"model.safetensors": {"a": ONE}}, {"a": "model.safetensors"}, "keep the one"),
        ({}, None, "is it the folder of a checkpoint"),
        ({F1: {"a": ONE}}, {"a": "x" * 300 + ".safetensors"}, "cannot be opened"),
        ({F1: {"a": ONE}}, {"a": "\ud800.safetensors"}, "cannot be opened"),
    ],
)
def test_folders_whose_parts_do_not_fit(tmp_path, files, weight_map, message):
    folder = make_folder(tmp_path / "m", files, weight_map)
    with pytest.raises(ValueError, match=message), open_folder(folder):
        pass


def test_pickled_weights_are_told_from_none(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save_pretrained"), open_folder(tmp_path):
        pass


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}']
)
def test_an_index_that_is_no_json(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=INDEX_FILE), open_folder(tmp_path):
        pass


@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_a_source_that_changes_is_noticed(tmp_path, how):
    folder = make_folder(tmp_path / "m", {"model.safetensors": {"a": ONE}})
    path = folder / "model.safetensors"
    with open_folder(folder) as source:
        source.check_unchanged()
        if how == "written to":
            with path.open("ab") as stream:
                stream.write(b"x")
        else:
            save_file({"a": TWO}, folder / "new")
            os.replace(folder / "new", path)
        with pytest.raises(ValueError, match="changed while it was read"):
            source.check_unchanged()


def test_a_read_beyond_the_end(tmp_path):
    file = SafetensorsFile(write(tmp_path / "x.safetensors", HEADER))
    os.truncate(file.path, file.size - 4)
    with pytest.raises(ValueError, match="ends at byte"):
        file.read_into(memoryview(bytearray(6)), file.tensors["b"].begin)
    file.close()


def test_a_long_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A file of holes takes no space on the disk, and would take gigabytes of memory."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", LONGEST_HEADER + 1))
    os.truncate(path, 2 * LONGEST_HEADER)
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: (read.append(len(b[0])), preadv(fd, b, at))[1])
    with pytest.raises(ValueError, match=rf"x\.safetensors: its header has .* at most {LONGEST_HEADER}"):
        SafetensorsFile(path)
    assert sum(read) == 8
    monkeypatch.setattr(safetensors_files, "LONGEST_HEADER", 1000)
    (tmp_path / "config.json").write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(ValueError, match=r"config\.json: has 1009 bytes"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_config_that_is_no_file(tmp_path, kind):
    path = tmp_path / "config.json"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(ValueError, match=r"config\.json: (is not a regular file|cannot be opened)"):
        read_json(path)
