"""What several files of tests share: evaluate() without lm-eval, and the nine with it."""

import functools
from types import SimpleNamespace

import pytest

from evaluation import letters, nine, tiny
from evaluation.stub import Stub
from minitron_kernels.evaluation import harness


@pytest.fixture
def stub(monkeypatch, tmp_path):
    tiny.save_model(tmp_path / "model")
    stub = Stub(tmp_path / "model")
    monkeypatch.setattr(harness, "check_installed", lambda: None)
    monkeypatch.setattr(harness, "version", lambda: "0")
    manager = SimpleNamespace(task_index=stub.index)
    monkeypatch.setattr(harness, "manager_of", lambda folder, defaults: manager)
    monkeypatch.setattr(harness, "load_task", stub.load)
    monkeypatch.setattr(harness, "wrap", lambda model, tokenizer, **options: None)
    monkeypatch.setattr(harness, "run", stub.run)
    return stub


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(model's folder, folder of data sets)."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("nine")
    letters.save(folder / "model")
    nine.save(folder / "datasets")
    with pytest.MonkeyPatch.context() as patch:
        # lm-eval's thousands of files are read once, not by each test
        patch.setattr(harness, "manager_of", functools.cache(harness.manager_of))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield folder / "model", folder / "datasets"


@pytest.fixture
def asked():
    with nine.recorded() as found:
        yield found
