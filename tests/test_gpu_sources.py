"""What only a GPU, or a second one, would show of how the Python code uses it: read off the sources."""

import ast
from pathlib import Path

import pytest

import minitron_kernels

OPS = Path(minitron_kernels.__file__).parent / "ops"
SOURCES = {str(path.relative_to(OPS)): path for path in sorted(OPS.rglob("*.py"))}
LAUNCHERS = [name for name, path in SOURCES.items() if "import triton" in path.read_text()]
# these ask about the GPU that is current
OF_CURRENT_GPU = ("linear_blocks",)
# copies of numbers to the device, which wait for it and which no CUDA graph can hold: of none of those that a
# call on a GPU makes
COPIES = ("tensor", "as_tensor", "new_tensor", "from_numpy")
ALLOWED = {
    "kl_loss/states.py": "shards of two models, which are merged by it on the CPU alone",
    "kl_loss/find_shard.py": "made once for each kind of call, not in a capture",
}


def guarded(node, inside=False):
    """(call, whether it is within `with torch.cuda.device_of(...)`), of all calls."""
    if isinstance(node, ast.With):
        inside = inside or any("torch.cuda.device_of(" in ast.unparse(item) for item in node.items)
    elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
        inside = False
    if isinstance(node, ast.Call):
        yield node, inside
    for child in ast.iter_child_nodes(node):
        yield from guarded(child, inside)


def launches(tree):
    """(line, whether it is guarded) of each call that launches a kernel or asks about the current GPU."""
    for call, inside in guarded(tree):
        called = call.func
        launch = isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith("_kernel")
        if launch or (isinstance(called, ast.Name) and called.id in OF_CURRENT_GPU):
            yield call.lineno, inside


@pytest.mark.parametrize("name", LAUNCHERS)
def test_triton_launches_on_the_device_of_its_tensors(name):
    """Triton launches on the current GPU, whatever GPU the tensors are on."""
    found = list(launches(ast.parse(SOURCES[name].read_text())))
    assert [line for line, inside in found if not inside] == []
    assert found or "launch" not in name


def test_every_launch_is_seen():
    lines = ("some_kernel[(1,)](x)", "with torch.cuda.device_of(x):", "    some_kernel[(1,)](x)")
    assert list(launches(ast.parse("\n".join(lines)))) == [(1, False), (3, True)]
    assert sum(len(list(launches(ast.parse(SOURCES[name].read_text())))) for name in LAUNCHERS) >= 14


@pytest.mark.parametrize("name", SOURCES)
def test_no_call_copies_numbers_from_the_host(name):
    lines = [
        call.lineno
        for call, _ in guarded(ast.parse(SOURCES[name].read_text()))
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in COPIES
        and "device='cpu'" not in ast.unparse(call)
    ]
    assert bool(lines) == (name in ALLOWED), f"lines {lines}; torch.full and new_full are made on the device"
