"""Calibration text out of files of many forms, and windows of a long text of which a part is tokenised."""

import bz2
import gzip
import itertools
import json
import lzma
import tracemalloc

import numpy as np
import pytest
import torch

from minitron_kernels._command import documents
from minitron_kernels._command import text as text_module
from minitron_kernels.pruning.score.calibration import calibration_windows
from pruning.test_calibration import Begun, Letters, in_letters, tokens, windows

ROWS = [{"text": "ab", "body": "xyz"}, {"text": "c", "body": "w"}]
WANTED = (in_letters("ab") + in_letters("c"))[:4]


class Chat(Letters):
    """A tokenizer with a template for chats."""

    chat_template = "of this test"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        if any(message["role"] == "nobody" for message in messages):
            raise RuntimeError("Unexpected role")
        return "".join(f"{message['role'][0]}{message['content']}" for message in messages)


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_lines(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(as_jsonl(ROWS)))
    assert tokens(path) == WANTED
    path.rename(tmp_path / "a.txt").write_bytes(pack(b"ab"))  # by its content, whatever it is called
    assert tokens(tmp_path / "a.txt") == in_letters("ab")[:2]
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"some text, some text")[:-9])
    with pytest.raises(ValueError, match=r"b\.txt.*: cannot be unpacked"):
        tokens(tmp_path / f"b.txt{suffix}")


@pytest.mark.parametrize(
    ("head", "suffix"),
    [(b"PAR1", ".parquet"), (b"ARROW1", ".arrow"), (b"\xff" * 4, ".arrow"), (b"\x93NUMPY", ".npy")],
)
def test_what_is_not_text_is_named_inside_too(tmp_path, head, suffix):
    """Compressed as a whole it is read under no name, and each error says what to do."""
    packed = tmp_path / "data.gz"
    packed.write_bytes(gzip.compress(head + b"\0\xfe" * 9))
    for name in ("data.gz", "data.txt.gz", f"data{suffix}.gz", f"data{suffix}"):
        if name == "data.npy":  # refused by NumPy
            continue
        packed = packed.rename(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: .*compressed as a whole: unpack it, to a \{suffix}"):
            tokens(packed)
    packed.rename(tmp_path / "data.txt").write_bytes(head + b"\0\xfe" * 9)
    with pytest.raises(ValueError, match=rf"data\.txt: is .*, but is not called so: rename it to \{suffix}"):
        tokens(tmp_path / "data.txt")


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="needs pip install zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(as_jsonl(ROWS)))
    assert tokens(tmp_path / "a.jsonl.zst") == WANTED
    (tmp_path / "b.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04")
    with pytest.raises(ValueError, match=r"b\.txt\.zst: cannot be unpacked"):
        tokens(tmp_path / "b.txt.zst")


def test_parquet_and_arrow(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: [row[name] for row in ROWS] for name in ("body", "text")})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with (
        pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)
    with (
        pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert tokens(tmp_path / name) == WANTED, name
        found = windows(tmp_path / name, text_key="body").flatten().tolist()
        assert found == in_letters("xyz") + in_letters("w"), name
        with pytest.raises(ValueError, match=rf"{name}: has no column 'words', but 'body', 'text'.*text_key"):
            windows(tmp_path / name, text_key="words")
        (tmp_path / name).rename(tmp_path / "d.txt")
        with pytest.raises(ValueError, match=r"d\.txt: is (Parquet|Arrow), but is not called so"):
            tokens(tmp_path / "d.txt")
        (tmp_path / name).write_bytes((tmp_path / "d.txt").read_bytes()[:-20])
        with pytest.raises(ValueError, match=f"{name}: cannot be read as"):
            tokens(tmp_path / name)


def test_a_folder_is_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS[1:])))
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "dataset_info.json").write_text("{}")  # as data sets have beside their files
    assert tokens(tmp_path) == WANTED
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: is a folder without \.txt"):
        tokens(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such file"):
        tokens(tmp_path / "nothing")


def test_keys_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(ROWS))
    assert windows(path, text_key="body").flatten().tolist() == in_letters("xyz") + in_letters("w")
    with pytest.raises(
        ValueError, match=r"line 1 is not a JSON object with a \"words\": it has 'text', 'body'"
    ):
        windows(path, text_key="words")


def test_chats(tmp_path):
    path, talk = (
        tmp_path / "a.jsonl",
        [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
    )
    path.write_bytes(as_jsonl([{"messages": talk}]))
    assert windows(path, tokenizer=Chat(), length=5).flatten().tolist() == in_letters("ubac")
    path.write_bytes(as_jsonl([{"talk": talk}]))
    assert windows(path, tokenizer=Chat(), length=5, text_key="talk").flatten().tolist() == in_letters("ubac")
    with pytest.raises(ValueError, match="line 1 has chat messages, but the tokenizer has no chat template"):
        windows(path, text_key="talk")
    for messages, message in (([], "must have a string"), ([{"content": "b"}], "must have a string")):
        path.write_bytes(as_jsonl([{"messages": messages}]))
        with pytest.raises(ValueError, match=message):
            windows(path, tokenizer=Chat())
    path.write_bytes(as_jsonl([{"messages": [{"role": "nobody", "content": ""}]}]))
    with pytest.raises(ValueError, match="line 1: the chat template refuses its messages: Unexpected role"):
        windows(path, tokenizer=Chat())


class Counting(Letters):
    """A tokenizer that counts the characters it is given."""

    def __init__(self, letters=1):
        self.seen, self.letters = 0, letters

    def __call__(self, text, **options):
        self.seen += len(text)
        return {"input_ids": [ord(text[place]) for place in range(0, len(text), self.letters)]}


def long_text(words):
    return " ".join(f"{number:04d}" for number in range(words))


@pytest.fixture
def short_is_long(monkeypatch):
    monkeypatch.setattr(text_module, "_LEAST_CHARACTERS", 1000)


def test_of_a_long_text_what_is_drawn_is_tokenised(tmp_path, short_is_long):
    text = long_text(2000)
    (tmp_path / "a.txt").write_text(text)
    counting = Counting()
    found = windows(tmp_path / "a.txt", tokenizer=counting, length=10, samples=5)
    assert counting.seen < 5 * 80 + 10 < len(text) / 10
    places = [text.index("".join(map(chr, row))) for row in found.tolist()]  # words are unlike each other
    assert found.shape == (5, 10) and places == sorted(places)
    assert all(place == 0 or text[place - 1] == " " for place in places)  # none begins within a word
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(places))
    again = windows(tmp_path / "a.txt", tokenizer=Counting(), length=10, samples=5)
    others = windows(tmp_path / "a.txt", tokenizer=Counting(), length=10, samples=5, seed=1)
    assert again.equal(found) and not others.equal(found)


def test_long_texts_of_few_tokens_and_of_many_documents(tmp_path, short_is_long):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": f"{number:03d}"} for number in range(1000)]))
    found = windows(tmp_path / "a.jsonl", length=10, samples=20)
    for row in found.tolist():
        assert row.count(1) >= 2 and 1 not in row[:1]  # texts of three letters, each with its end
        numbers = "".join(chr(token) if token != 1 else " " for token in row).split()
        whole = [int(number) for number in numbers if len(number) == 3]
        assert whole == list(range(whole[0], whole[0] + len(whole)))
    text = long_text(4000)
    (tmp_path / "b.txt").write_text(text)
    # a token is 20 letters, more than a stretch allows for: windows go on behind their stretch
    found = windows(tmp_path / "b.txt", tokenizer=Counting(20), length=10, samples=5)
    assert found.shape == (5, 10)
    begun = windows(tmp_path / "b.txt", tokenizer=Begun(), length=10, samples=5)
    assert begun[:, 0].tolist() == [2] * 5 and not (begun[:, 1:] == 2).any()


def test_where_most_is_wanted_all_is_tokenised(tmp_path, short_is_long):
    (tmp_path / "a.txt").write_text(long_text(300))
    some = windows(tmp_path / "a.txt", length=10, samples=100)
    everything = windows(tmp_path / "a.txt", length=10)
    rows = {tuple(row) for row in everything.tolist()}
    assert len(some) == 100 and {tuple(row) for row in some.tolist()} <= rows
    np.save(tmp_path / "b.npy", np.arange(5000))
    found = calibration_windows([tmp_path / "b.npy"], None, length=10, samples=3)
    assert (found[:, 0] % 10 == 0).all()


def test_capital_letters_are_the_same_suffix(tmp_path):
    (tmp_path / "A.JSONL").write_bytes(as_jsonl(ROWS))
    (tmp_path / "B.jsonl.GZ").write_bytes(gzip.compress(as_jsonl(ROWS)))
    assert tokens(tmp_path / "A.JSONL") == tokens(tmp_path / "B.jsonl.GZ") == WANTED
    with (tmp_path / "C.NPY").open("wb") as stream:
        np.save(stream, np.arange(8))
    assert tokens(tmp_path / "C.NPY") == list(range(8))


def test_json_lines_are_not_scored_as_text(tmp_path):
    for name in ("a.txt", "b"):
        (tmp_path / name).write_bytes(b"\n" + as_jsonl(ROWS))
        message = rf'{name}: has lines of JSON with a "text": rename it to \.jsonl'
        with pytest.raises(ValueError, match=message):
            tokens(tmp_path / name)
    (tmp_path / "c.txt").write_bytes(as_jsonl([{"body": "ab"}]))
    with pytest.raises(ValueError, match='"body"'):
        windows(tmp_path / "c.txt", text_key="body")
    for text in ('{"text": "ab", and no more', '["text"]', '{"other": 1}', '{"text": 1}'):
        (tmp_path / "c.txt").write_text(text)
        assert tokens(tmp_path / "c.txt")[:2] == in_letters(text)[:2]


def test_a_folder_of_a_data_set_is_its_data(tmp_path):
    """A download of the hub has a card, and a hidden folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.txt").write_text("not this")
    assert tokens(tmp_path) == WANTED
    (tmp_path / "data" / "a.jsonl").unlink()
    assert tokens(tmp_path) == in_letters("what this is")[:12]  # of text alone it is a text


def test_the_key_that_is_wrong_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r'row 1 must have a string as its "body".*got NoneType'):
        windows(tmp_path / "a.parquet", text_key="body")


@pytest.mark.parametrize("length", [2, 10])
def test_windows_are_drawn_wherever_new_tensors_are_made(tmp_path, short_is_long, length):
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + number) for number in range(8000)))
    want = windows(tmp_path / "a.txt", length=length, samples=40)
    with torch.device("meta"):
        assert torch.equal(windows(tmp_path / "a.txt", length=length, samples=40), want)
        few = windows(tmp_path / "a.txt", length=4000, samples=1)  # tokenised as a whole
    assert few.device.type == "cpu" and few.shape == (1, 4000)


class Words(Letters):
    """One token a word; the same token for the same word."""

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split(" ") if word]}


def test_drawn_windows_are_pieces_of_the_text_as_a_whole(tmp_path, short_is_long):
    words = [10_000_000_000 + number for number in range(3000)]  # longer than a stretch allows for
    (tmp_path / "a.txt").write_text(" ".join(map(str, words)))
    found = windows(tmp_path / "a.txt", tokenizer=Words(), length=10, samples=9)
    assert found.shape == (9, 10)
    for row in found.tolist():
        assert row == list(range(row[0], row[0] + 10)) and row[0] in words


def test_drawn_windows_do_not_overlap_where_spaces_are_rare(tmp_path, short_is_long):
    letters = [chr(0x4E00 + number) for number in range(8000)]  # as in Chinese, each once
    for place in range(79, 8000, 160):
        letters[place] = " "
    (tmp_path / "a.txt").write_text("".join(letters))
    found = windows(tmp_path / "a.txt", length=10, samples=40).flatten()
    found = found[found != ord(" ")]
    assert len(found) >= 360 and len(found.unique()) == len(found)


def test_texts_are_read_a_part_at_a_time(tmp_path, monkeypatch):
    """Tokens are those of the text as a whole, wherever parts of it end."""
    letters = "".join(chr(code) for code in (*range(0x61, 0x7B), 0xE9, 0x4E2D, 0x1F600, 0x2028)) * 9
    rows = [{"text": letters[:length]} for length in (0, 1, 7, 64, 65, 200, 3)]
    whole = [token for row in rows for token in in_letters(row["text"])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + ("\n \n" + letters).encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(letters.encode()))
    (tmp_path / "d.txt").write_bytes(b"")
    files = [tmp_path / name for name in ("a.jsonl", "b.txt", "c.txt.gz", "d.txt", "a.jsonl")]
    expected = whole + in_letters("\n \n" + letters) + in_letters(letters) + in_letters("") + whole
    for chunk, piece, call, held in ((1, 1, 1, 1), (7, 64, 100, 64), (64, 65, 1, 1 << 20), (1 << 20,) * 4):
        monkeypatch.setattr(documents, "_CHUNK", chunk)
        monkeypatch.setattr(text_module, "_PIECE_CHARACTERS", piece)
        monkeypatch.setattr(text_module, "_CALL_CHARACTERS", call)
        monkeypatch.setattr(text_module, "_IN_MEMORY", held)
        found = text_module.TokenWindows(files, Letters(), length=2)
        assert found.tokens == len(expected)
        read = [token for index in range(len(found)) for token in found[index].tolist()]
        assert read == expected[: len(read)] and found.ids_range() == (min(expected), max(expected))
    np.save(tmp_path / "e.npy", np.arange(5))
    between = text_module.TokenWindows([files[0], tmp_path / "e.npy", files[3]], Letters(), length=2)
    assert between.tokens == len(whole) + 5 + 1 and between[len(whole) // 2].tolist()[-1] in range(5)


def test_of_a_long_text_a_part_is_in_memory(tmp_path, monkeypatch):
    with (tmp_path / "a.jsonl").open("w") as lines, (tmp_path / "b.txt").open("w") as text:
        for number in range(3000):
            lines.write(json.dumps({"text": f"{number:0500d}"}) + "\n")
            text.write(f"{number:0500d} ")
    monkeypatch.setattr(documents, "_CHUNK", 1 << 14)
    monkeypatch.setattr(text_module, "_PIECE_CHARACTERS", 1 << 14)
    monkeypatch.setattr(text_module, "_CALL_CHARACTERS", 1 << 14)
    monkeypatch.setattr(text_module, "_IN_MEMORY", 1 << 16)
    for name in ("a.jsonl", "b.txt"):
        tracemalloc.start()
        found = text_module.TokenWindows([tmp_path / name], Counting(50), length=10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found) >= 3000 and peak < (1 << 20) < (tmp_path / name).stat().st_size, (name, peak)


def test_fast_tokenizers_get_many_texts_at_once(tmp_path):
    class Fast(Letters):
        is_fast, calls = True, 0

        def __call__(self, texts, **options):
            self.calls += 1
            one = super().__call__
            return (
                one(texts) if isinstance(texts, str) else {"input_ids": [one(t)["input_ids"] for t in texts]}
            )

    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS * 50))
    fast = Fast()
    found = text_module.TokenWindows([tmp_path / "a.jsonl"], fast, length=5)
    plain = text_module.TokenWindows([tmp_path / "a.jsonl"], Letters(), length=5)
    assert fast.calls <= 3 and found.tokens == plain.tokens
    assert all(found[index].equal(plain[index]) for index in range(len(plain)))


def test_no_space_for_tokens_says_where(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("ab" * 100)
    monkeypatch.setattr(text_module, "_IN_MEMORY", 1)

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_module.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"No space left on device: the tokens.*set TMPDIR"):
        text_module.TokenWindows([tmp_path / "a.txt"], Letters(), length=2)
