"""A training loop prunes its parameters and goes on as a fresh optimizer with state cut by hand would."""

import copy

import pytest
import torch

import minitron_kernels as mk

HIDDEN, KEEP = 24, torch.tensor([1, 2, 3, 8, 9, 17, 20, 23])
X = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))


def make_model(hidden=HIDDEN):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(10, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3))


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


def replacements_of(model, keep):
    """Of the hidden neurons: rows of the first weight and its bias, columns of the second weight."""
    up, down = model[0], model[2]
    cuts = ((up, "weight", keep, None), (up, "bias", None, keep), (down, "weight", None, keep))
    return [
        (module, name, mk.ParameterReplacement(old, gathered(old, rows, cols), rows, cols))
        for module, name, rows, cols in cuts
        for old in (getattr(module, name),)
    ]


@torch.no_grad()
def gathered(old, rows, cols):
    return torch.nn.Parameter(mk.gather_channels(old, rows, cols))


def prune(model, optimizer, keep=KEEP):
    plan = replacements_of(model, keep)
    mk.gather_optimizer_state_(optimizer, [one for _, _, one in plan])
    for module, name, one in plan:
        setattr(module, name, one.new)


def cut_by_hand(name, value):
    """A parameter, or a tensor of its state, cut by plain indexing."""
    if name in ("0.weight", "0.bias"):  # a factor of Adafactor has one row or one column
        return value[KEEP] if value.dim() and value.shape[0] == HIDDEN else value
    if name == "2.weight":
        return value[:, KEEP] if value.dim() and value.shape[1] == HIDDEN else value
    return value


OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "AdamW with amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "fused Adam": lambda params: torch.optim.Adam(params, lr=1e-2, fused=True),
    "foreach Adam": lambda params: torch.optim.Adam(params, lr=1e-2, foreach=True),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "plain SGD": lambda params: torch.optim.SGD(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name):
    make = OPTIMIZERS[name]
    model = make_model()
    optimizer = make(model.parameters())
    train(model, optimizer)

    fresh = make_model(len(KEEP))
    fresh.load_state_dict({key: cut_by_hand(key, value) for key, value in model.state_dict().items()})
    other = make(fresh.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    for number, (key, _) in enumerate(model.named_parameters()):
        for entry, value in state["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor):
                state["state"][number][entry] = cut_by_hand(key, value)
    other.load_state_dict(state)

    prune(model, optimizer)
    for (key, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), key
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    train(fresh, other)
    for (key, a), b, c in zip(model.named_parameters(), fresh.parameters(), before, strict=True):
        assert torch.equal(a, b), key
        assert not torch.equal(a, c), key
    assert len(optimizer.state) <= 4 and optimizer.state_dict()["state"].keys() == state["state"].keys()


def test_master_weights_and_groups():
    """A copy in fp32 among the state is gathered, in its own dtype; groups keep order and options."""
    weight = torch.nn.Parameter(torch.randn(6, 5).bfloat16())
    bias = torch.nn.Parameter(torch.randn(6).bfloat16())
    optimizer = torch.optim.AdamW([{"params": [bias, weight], "lr": 0.5}, {"params": [], "lr": 0.1}])
    master = weight.detach().float() + 1e-4
    optimizer.state[weight] = {"master": master, "step": 7, "nothing": None, "scale": torch.ones(1)}
    rows, cols = torch.tensor([5, 0]), torch.tensor([1, 4, 2])
    new = gathered(weight, rows, cols)
    mk.gather_optimizer_state_(optimizer, [(weight, new, rows, cols)])
    assert optimizer.param_groups[0]["params"][1] is new and optimizer.param_groups[0]["lr"] == 0.5
    state = optimizer.state[new]
    assert torch.equal(state["master"], master[rows][:, cols]) and state["master"].dtype == torch.float32
    assert (state["step"], state["nothing"], state["scale"].item()) == (7, None, 1.0)
    assert weight not in optimizer.state and bias not in optimizer.state


def test_a_dropped_parameter():
    model = make_model()
    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-2)
    train(model, optimizer, 1)
    mk.gather_optimizer_state_(optimizer, [(model[0].bias, None)])
    group = optimizer.param_groups[0]
    assert group["param_names"] == ["0.weight", "2.weight", "2.bias"] and len(group["params"]) == 3
    assert len(optimizer.state) == 3 and model[0].bias not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())


def bad_replacements(model):
    """name: (replacements, error, message); most begin with a good one."""
    good = replacements_of(model, KEEP)[0][2]
    bias, down = model[0].bias, model[2].weight
    short = torch.nn.Parameter(torch.zeros(7))
    fitting = torch.nn.Parameter(torch.zeros(8))
    return {
        "a stranger": ([(fitting, fitting)], ValueError, r"replacements\[0\].old must be a parameter"),
        "twice": ([good, good], ValueError, r"replacements\[1\].old comes a second time"),
        "there already": ([good, (bias, down)], ValueError, r"replacements\[1\].new is a parameter"),
        "new twice": (
            [(bias, fitting, None, KEEP), (model[2].bias, fitting)],
            ValueError,
            r"replacements\[1\].new is a parameter",
        ),
        "wrong shape": ([good, (bias, short, None, KEEP)], ValueError, r"\.new must be \(8,\).* got \(7,\)"),
        "bad index": ([good, (bias, fitting, None, KEEP + 5)], ValueError, r"\[1\]: cols\[6\] is 25"),
        "rows of a vector": ([good, (bias, fitting, KEEP)], ValueError, r"\[1\]: rows must be None"),
    }


@pytest.mark.parametrize("name", bad_replacements(make_model()))
def test_errors_change_nothing(name):
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, 1)
    params, state = list(optimizer.param_groups[0]["params"]), dict(optimizer.state)
    replacements, error, message = bad_replacements(model)[name]
    with pytest.raises(error, match=message):
        mk.gather_optimizer_state_(optimizer, replacements)
    assert all(a is b for a, b in zip(params, optimizer.param_groups[0]["params"], strict=True))
    assert optimizer.state.keys() == state.keys()
    assert all(optimizer.state[p] is state[p] for p in params)


def test_state_that_is_not_understood():
    model = make_model()
    plan = [one for _, _, one in replacements_of(model, KEEP)]
    optimizer = torch.optim.Adam(model.parameters())
    for state, error, message in (
        ({"factor": torch.zeros(3)}, ValueError, r"state 'factor' has shape \(3,\)"),
        ({"history": []}, TypeError, "state 'history' must be a tensor or a number, got list"),
    ):
        optimizer.state[plan[-1].old] = state
        with pytest.raises(error, match=message):
            mk.gather_optimizer_state_(optimizer, plan)
        assert optimizer.param_groups[0]["params"][0] is plan[0].old
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        mk.gather_optimizer_state_(model, plan)
