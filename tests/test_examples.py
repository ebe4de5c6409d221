"""The parts of the examples that could mislead: what counts as text, and that nothing unseen was seen."""

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "examples"
if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no examples folder here", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import prose  # noqa: E402

RUNNING = "A sentence that is long enough to be told from a heading. " * 4


def tokenizer(text):
    return {"input_ids": list(text.encode())}


def test_only_running_text_is_kept():
    text = f"""Heading
=======

{RUNNING}

::

   {RUNNING}

.. note:: {RUNNING}

short

>>> {RUNNING}
"""
    assert list(prose.paragraphs(text)) == [RUNNING.strip()]


def test_a_paragraph_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text(f"{RUNNING}\n\n{RUNNING}")
    (tmp_path / "b.md").write_text(f"{RUNNING}\n\nAnother. {RUNNING}")
    (tmp_path / "c.py").write_text(RUNNING)
    found = prose.documents([tmp_path])
    assert [len(text) for text in found.values()] == [1, 1]
    with pytest.raises(FileNotFoundError, match=r"no text in .*empty"):
        (tmp_path / "empty").mkdir()
        prose.documents([tmp_path / "empty"])


def test_unseen_documents_share_no_paragraph_with_the_others():
    learn, unseen = prose.split(prose.documents())
    assert len(unseen) > 200 and len(learn) > 4 * len(unseen)
    assert set(learn).isdisjoint(unseen)


def test_windows():
    windows = prose.windows(tokenizer, ["abcd", "ef"], 2, 4)
    assert windows.tolist() == [list(b"abcd"), list(b"\n\nef")] and windows.dtype == torch.long
    with pytest.raises(ValueError, match="3 windows of 4 tokens are wanted, the text has 10 tokens"):
        prose.windows(tokenizer, ["abcd", "ef"], 3, 4)
