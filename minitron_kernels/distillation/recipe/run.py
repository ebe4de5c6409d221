"""Runs the stages of a recipe that are not done, one after the other."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence

from minitron_kernels.distillation.recipe.graph import TRAINED, Graph, Node
from minitron_kernels.distillation.recipe.stages import WRITERS, Context
from minitron_kernels.distillation.recipe.state import AGAIN, DONE, GO_ON, NEW, State

Verdicts = dict[str, tuple[str, str]]


def verdicts_of(graph: Graph, state: State) -> Verdicts:
    """{path of a stage: (what is to be done with it, why again)}."""
    return {node.path: state.verdict(node) for node in graph.nodes}


def check_free(graph: Graph, state: State, verdicts: Verdicts, *, redo: bool) -> None:
    """Checks, before any work, that nothing is replaced that must not be.

    Raises:
        FileExistsError: results would go where something else is.
        ValueError: a trained model would be made again, and --redo is not given.
    """
    for node in graph.nodes:
        there = state.out / node.path
        if node.path not in state.entries and os.path.lexists(there):
            raise FileExistsError(
                17, "is there already, and is not of this recipe; take another out", str(there)
            )
    lost = [
        f"{node.path} ({verdicts[node.path][1]})"
        for node in graph.nodes
        if verdicts[node.path][0] == AGAIN and _is_trained(node, state)
    ]
    if lost and not redo:
        raise _lost("; ".join(lost))


def _is_trained(node: Node, state: State) -> bool:
    return node.stage in TRAINED and (state.out / node.path).exists()


def _lost(models: str) -> ValueError:
    return ValueError(
        f"a trained model would be thrown away and made again: {models}. Say --redo, take another out, or "
        "set the recipe back"
    )


def run(graph: Graph, state: State, context: Context, verdicts: Verdicts, *, redo: bool = False) -> int:
    """Makes what is not done; returns 0, or the exit code of a training stage that a signal stopped.

    Raises:
        ValueError: what a trained model was made of came out otherwise this time, and redo is not given.
    """
    number, total = 0, sum(what != DONE for what, _ in verdicts.values())
    for node in graph.nodes:
        what, why = verdicts[node.path]
        if what in (DONE, GO_ON) and (remade := state.remade(node)):
            if _is_trained(node, state) and not redo:
                raise _lost(f"{node.path} ({remade})")
            total += what == DONE
            what, why = AGAIN, remade
        if what == DONE:
            continue
        number += 1
        note = {AGAIN: f", again: {why}", GO_ON: ", goes on", NEW: ""}[what]
        context.say(f"{number} of {total}", f"{node.path}{note}")
        begin = time.monotonic()
        if what != GO_ON:
            clear(node, state)
            state.begin(node)
        try:
            code = _make(node, context, goes_on=what == GO_ON)
        except BaseException:
            state.spent(node, time.monotonic() - begin)
            raise
        if code:
            state.spent(node, time.monotonic() - begin)
            return code
        state.finish(node, time.monotonic() - begin)
    return 0


def clear(node: Node, state: State) -> None:
    """Removes what a stage made before; its entry says so first."""
    there = state.out / node.path
    if os.path.lexists(there):
        state.forget(node)
        shutil.rmtree(there)


def _make(node: Node, context: Context, *, goes_on: bool) -> int:
    """Makes the results of a stage; those that are not trained appear whole, by one rename."""
    there = context.out / node.path
    there.parent.mkdir(parents=True, exist_ok=True)
    if node.stage in TRAINED:
        from minitron_kernels.distillation.recipe.train import drop_checkpoints, train

        code = train(node, there, context)
        if not code:
            drop_checkpoints(there)
        return code
    if there.exists():  # it was killed between the rename and its note
        return 0
    if node.stage == "prune":  # does so itself, and goes on from the files that are finished
        said = WRITERS["prune"](node, there, context)
    else:
        aside = there.with_name(f".{there.name}.partial")
        keeps = node.stage == "evaluate"  # tasks that are done
        if not (keeps and goes_on):
            shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(exist_ok=True)
        try:
            said = WRITERS[node.stage](node, aside, context)
        except BaseException:
            if not keeps:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        os.rename(aside, there)
    _tell(node, said.splitlines(), context)
    return 0


def _tell(node: Node, lines: Sequence[str], context: Context) -> None:
    from minitron_kernels._command.messages import show

    show("\n".join([f"{node.path}: {lines[0]}", *(f"  {line}" for line in lines[1:])]))
