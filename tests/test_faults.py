"""Every fault that can be planted still finds its place in the sources, also where it is not planted now."""

import pytest

from tools.faults import Fault
from tools.host_shim import CSRC
from tools.triton_runs import PACKAGE, faults_of, ops_with


def faults_in(x):
    if isinstance(x, Fault):
        yield x
    elif isinstance(x, dict):
        yield from faults_in(list(x.values()))
    elif isinstance(x, (list, tuple)):
        for inner in x:
            yield from faults_in(inner)


@pytest.mark.parametrize("op", ops_with("TRITON_VALUES"))
def test_every_fault_has_its_place(op):
    faults = [fault for name, x in vars(faults_of(op)).items() if name.isupper() for fault in faults_in(x)]
    assert len(faults) > 10
    for fault in faults:
        source = next(path for path in (CSRC / fault.file, PACKAGE / "ops" / fault.file) if path.is_file())
        assert fault.plant(source.read_text()) != source.read_text()
