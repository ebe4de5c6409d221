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
        return value[..., KEEP] if value.dim() and value.shape[-1] == HIDDEN else value
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
    "Adafactor of transformers": lambda params: adafactor(params),
    "Adafactor of transformers with moments": lambda params: adafactor(params, beta1=0.9),
}


def adafactor(params, **options):
    """Factors without the axis that they are means over; [C] of a matrix [R, C]."""
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=1e-2, relative_step=False, scale_parameter=True, **options)


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


@pytest.mark.parametrize("name", ["Adam", "Adafactor", "Adafactor of transformers"])
@pytest.mark.parametrize("width", [6, 7])  # as wide as high: a factor's name tells its axis
def test_stacked_experts(name, width):
    """Each expert's rows and columns; the state of those that stay, in their new order."""
    torch.manual_seed(2)
    stack = torch.nn.Parameter(torch.randn(4, 6, width))
    optimizer = OPTIMIZERS[name]([stack])
    for _ in range(2):
        stack.grad = torch.randn_like(stack)
        optimizer.step()
    rows = {3: torch.tensor([0, 2, 5]), 1: torch.tensor([1, 3, 4])}
    cols = (
        {3: torch.tensor([5, 1]), 1: None}
        if width == 2
        else {3: torch.tensor([5, 1]), 1: torch.tensor([0, 4])}
    )
    kept = [(expert, rows[expert], cols[expert]) for expert in (3, 1)]

    def by_hand(value, row=True, col=True):
        parts = []
        for expert, row_index, col_index in kept:
            part = value[expert]
            part = part[row_index] if row else part
            parts.append(part[..., col_index] if col else part)
        return torch.stack(parts)

    new = torch.nn.Parameter(by_hand(stack.detach()))
    before = copy.deepcopy(dict(optimizer.state[stack]))
    mk.gather_optimizer_state_(optimizer, [mk.ParameterReplacement(stack, new, experts=kept)])
    state = optimizer.state[new]
    cuts = {
        "row_var": dict(col=False),  # [E, R, 1]
        "exp_avg_sq_row": dict(col=False),  # [E, R]
        "col_var": dict(row=False),  # [E, 1, C]
        "exp_avg_sq_col": dict(row=False),  # [E, C]
    }
    checked = 0
    for key, value in before.items():
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            assert torch.equal(state[key], by_hand(value, **cuts.get(key, {}))), key
            checked += 1
        else:
            assert state[key] == value
    assert checked == 2
    new.grad = torch.randn_like(new)
    optimizer.step()
    with pytest.raises(ValueError, match="experts must name some of 2, each once, got \\[0, 0\\]"):
        twice = [(0, None, None), (0, None, None)]
        mk.gather_optimizer_state_(optimizer, [mk.ParameterReplacement(new, stack, experts=twice)])
    with pytest.raises(ValueError, match="experts needs an old of"):
        mk.gather_optimizer_state_(optimizer, [(new, stack, torch.tensor([0]), None, twice[:1])])


def test_a_square_factor_without_a_telling_name():
    weight = torch.nn.Parameter(torch.randn(5, 5))
    optimizer = torch.optim.AdamW([weight])
    rows = torch.tensor([4, 0])
    new = gathered(weight, rows, None)
    optimizer.state[weight] = {"factor": torch.rand(5)}
    with pytest.raises(
        ValueError, match=r"'factor' has shape \(5,\), which a parameter of \(5, 5\) does not"
    ):
        mk.gather_optimizer_state_(optimizer, [(weight, new, rows)])
    state = {"sq_row": torch.rand(5), "sq_col": torch.rand(5)}
    optimizer.state[weight] = dict(state)
    mk.gather_optimizer_state_(optimizer, [(weight, new, rows)])
    assert torch.equal(optimizer.state[new]["sq_row"], state["sq_row"][rows])
    assert torch.equal(optimizer.state[new]["sq_col"], state["sq_col"])


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
        ({"factor": torch.zeros(7)}, ValueError, r"state 'factor' has shape \(7,\)"),
        ({"moment": torch.zeros(2, HIDDEN)}, ValueError, r"state 'moment' has shape \(2, 24\)"),
        ({"history": []}, TypeError, "state 'history' must be a tensor or a number, got list"),
    ):
        optimizer.state[plan[-1].old] = state
        with pytest.raises(error, match=message):
            mk.gather_optimizer_state_(optimizer, plan)
        assert optimizer.param_groups[0]["params"][0] is plan[0].old
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        mk.gather_optimizer_state_(model, plan)
