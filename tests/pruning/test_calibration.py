"""Calibration windows from files: what counts as text, as lines, as token ids."""

import io
import json
import zipfile

import numpy as np
import pytest

from minitron_kernels.pruning.score.calibration import calibration_windows


class Letters:
    """A tokenizer of one token for each character."""

    eos_token_id = 1
    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}


class Begun(Letters):
    """One that puts its BOS before each text."""

    bos_token_id = 2

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [2] * add_special_tokens + super().__call__(text)["input_ids"]}


def windows(*files, tokenizer=None, length=2, samples=1000, **options):
    return calibration_windows(files, tokenizer or Letters(), length=length, samples=samples, **options)


def tokens(*files):
    return windows(*files).flatten().tolist()


def in_letters(text):
    return [ord(letter) for letter in text] + [1]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_jsonl_end_at_line_feeds_alone(tmp_path, suffix, end):
    texts = ["a\u2028b", "c\u0085d", "\u2029", "e\x0bf\x1c", "odd"]
    path = tmp_path / f"a.{suffix}"
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in texts]
    path.write_bytes(end.join([*lines[:2], "", "  ", *lines[2:], ""]).encode())
    wanted = [token for text in texts for token in in_letters(text)]
    assert tokens(path) == wanted[: len(wanted) // 2 * 2]


def test_text_is_read_as_it_is_but_for_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert tokens(path) == in_letters("[1]")
    path.rename(tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}')
    assert tokens(tmp_path / "a.jsonl") == in_letters("abc")


def test_files_follow_each_other_and_windows_begin_as_the_tokenizer_does(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    np.save(tmp_path / "b.npy", np.array([[7, 8], [9, 10]], dtype=np.uint16))
    files = tmp_path / "a.txt", tmp_path / "b.npy"
    assert windows(*files, length=4).tolist() == [[97, 98, 99, 1], [7, 8, 9, 10]]
    begun = windows(*files, tokenizer=Begun(), length=3)
    assert begun.tolist() == [[2, 97, 98], [2, 99, 1], [2, 7, 8], [2, 9, 10]]
    drawn = windows(*files, length=2, samples=3, seed=1)
    kept = [[97, 98], [99, 1], [7, 8], [9, 10]]
    assert len(drawn) == 3 and [row for row in kept if row in drawn.tolist()] == drawn.tolist()
    assert len({str(windows(*files, length=2, samples=3, seed=seed).tolist()) for seed in range(9)}) > 1
    assert windows(*files, length=2, samples=3, seed=1).equal(drawn)


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "text")
    return stream.getvalue()


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}]', r"a \.json is not read: write a \.jsonl"),
        ("a.npz", zipped(), r"zip archive.*\.npy by numpy\.save"),
        ("a.txt", b"abc\xff", "must be text in UTF-8, but byte 3 is not"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "is not a JSON object"),
        ("a.jsonl", b'\n{"text": "a"} {"text": "b"}', "line 2 is not a JSON"),
        ("a.jsonl", b'{"text": null}', 'must have a string as its "text", .* got NoneType'),
        ("a.jsonl", b'{"text": ["a"]}', "got list"),
        ("a.npy", saved(np.array([3, -1, 2])), "token ids must be 0 or greater, got -1"),
        ("a.npy", saved(np.array([3.0])), "token ids must be integers, got float64"),
        ("a.npy", b"", "cannot be read as token ids"),
        ("a.npy", saved(np.arange(9))[:-8], "cannot be read as token ids"),
        ("a.npy", saved(np.zeros(0, int)), "0 tokens are fewer than one window of 2"),
        ("a.npy", saved(np.ones(1, int)), "1 tokens are fewer than one window of 2"),
    ],
)
def test_files_that_are_not_text_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        windows(tmp_path / name)


@pytest.mark.parametrize("options", [dict(length=1), dict(samples=0)])
def test_sizes_are_checked(tmp_path, options):
    with pytest.raises(ValueError, match="seq-len must be at least 2 and samples at least 1"):
        windows(tmp_path / "none", **options)
