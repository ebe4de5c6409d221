"""One measurement of the KL loss in a fresh process, started by common.harness.run_worker().

The specification that it reads asks for "measure" (the memory of the first call, then time in turns with the
floor) or "errors" (of each implementation against float64, on the same random inputs).
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from common.harness import answer, extra_peak_bytes, interleave
from kl_loss_rows.cases import KL, WARM_UP, Case, Inputs, make_inputs, relative_error, truth
from kl_loss_rows.floor import Floor
from kl_loss_rows.implementation import step
from kl_loss_rows.peers import IMPLEMENTATIONS
from kl_loss_rows.roofline import rates

FLOOR_FP32 = "floor-fp32"


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """The memory of one call, and time in turns with the floor, of one implementation at one shape."""
    case, dtype, device = Case(**spec["case"]), spec["dtype"], spec["device"]
    inputs = make_inputs(case, dtype, device=device)
    values: list[torch.Tensor] = []
    result: dict[str, Any] = {"gradient_bytes": inputs.gradient_bytes, "extra_peak_bytes": None}
    if spec["key"] == FLOOR_FP32:
        call: Any = Floor(inputs, torch.float32)
        call()
    else:
        implementation = IMPLEMENTATIONS[spec["key"]]
        loss = implementation.build()
        if not implementation.has_teacher:
            _ = inputs.sparse  # made before anything is measured
        warm_up = inputs if implementation.compiles else make_inputs(WARM_UP, dtype, device=device)
        step(loss, warm_up)

        def call() -> None:
            values.append(step(loss, inputs))

        inputs.student_hidden.grad = inputs.student_head.grad = None
        result["extra_peak_bytes"] = extra_peak_bytes(call, device)
        inputs.student_hidden.grad = inputs.student_head.grad = None
    if torch.device(device).type == "cuda":
        result["rates"] = rates(dtype, device)
    # a sparse teacher is compared with the whole one, a cross-entropy with others
    four = spec["key"] == FLOOR_FP32 or IMPLEMENTATIONS[spec["key"]].target.kl
    floor = Floor(inputs, teacher=bool(four))
    pairs = interleave(floor, call, device, budget_s=spec["budget_s"], reps=tuple(spec["reps"]))
    result |= pairs.to_dict()
    if spec["key"] != FLOOR_FP32:
        check_work(inputs, values, pairs.calls + 1)
    return result


def check_work(inputs: Inputs, values: list[torch.Tensor], calls: int) -> None:
    """Ends the process unless each of the `calls` gave the same loss, and the last one gradients."""
    gradients = [inputs.student_hidden.grad, inputs.student_head.grad]
    found = [*values, *(gradient for gradient in gradients if gradient is not None)]
    whole = len(values) == calls and len(found) == calls + 2
    if not whole or not all(bool(x.isfinite().all() and x.any()) for x in found):
        raise SystemExit("wrong: what was timed gave no loss and gradients, or zeros, NaN or inf")
    if not all(torch.allclose(x.float(), values[0].float(), rtol=1e-3) for x in values):
        raise SystemExit("wrong: what was timed gave another loss from call to call")


def errors(spec: dict[str, Any]) -> dict[str, Any]:
    """Errors of loss, dX and dW against float64, of several implementations on the same inputs."""
    inputs = make_inputs(Case(**spec["case"]), spec["dtype"], spec["kind"], spec["device"], seed=1)
    targets = {KL, *(IMPLEMENTATIONS[key].target for key in spec["keys"])}
    exact = {target: truth(inputs, target) for target in targets}
    rows: dict[str, Any] = {}
    for key in spec["keys"]:
        implementation = IMPLEMENTATIONS[key]
        wanted = exact[implementation.target]
        gc.collect()
        try:
            value = float(step(implementation.build(), inputs))
            rows[key] = {
                "loss": abs(value - wanted.loss) / wanted.loss if implementation.gives_loss else None,
                "dX": relative_error(inputs.student_hidden.grad, wanted.dX),
                "dW": relative_error(inputs.student_head.grad, wanted.dW),
            }
        except Exception as error:  # one that cannot run must not stop the others; its row says why
            rows[key] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"kl": exact[KL].loss, "rows": rows}


if __name__ == "__main__":
    answer(lambda spec: {"measure": measure, "errors": errors}[spec["work"]](spec))
