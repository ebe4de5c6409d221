"""Which layer of the student is compared with which of the teacher; layers count from 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from minitron_kernels.ops.kl_loss.checks import integer, refuse

if TYPE_CHECKING:
    from minitron_kernels.pruning import PruningPlan


def layer_pairs(
    num_student: int, num_teacher: int, *, dropped: Iterable[int] | None = None, every: int = 1
) -> dict[int, int]:
    """{student layer: teacher layer} for a student with fewer layers than its teacher, or as many.

    With `dropped`, a student's layer is paired with the one that it was cut from: the i-th with the i-th
    teacher layer that was not dropped. Without, layers are evenly spaced, as in TinyBERT (arXiv 1909.10351):

        i -> ⌊(i + 1) num_teacher / num_student⌋ - 1

    In both the last layers are a pair unless the teacher's last one was dropped.

    Args:
        num_student: layers of the student.
        num_teacher: layers of the teacher.
        dropped: the teacher's layers that the student lacks, such as `--drop-layers` named.
        every: keep each `every`-th pair only, counted back from the last.

    Raises:
        TypeError, ValueError: a number that is no layer, more layers than the teacher has, or as many dropped
            as do not make up the difference; the message names it.

    Example:
        >>> layer_pairs(3, 6)
        {0: 1, 1: 3, 2: 5}
        >>> layer_pairs(4, 6, dropped=[3, 4], every=2)
        {1: 1, 3: 5}
    """
    for name, value in (("num_student", num_student), ("num_teacher", num_teacher), ("every", every)):
        if integer(name, value) < 1:
            refuse(name, "1 or more", value)
    if num_student > num_teacher:
        raise ValueError(
            f"num_student={num_student} is more than num_teacher={num_teacher}: a layer of the teacher would "
            "have to teach several; give the pairs yourself, {student layer: teacher layer}"
        )
    if dropped is None:
        teacher_layers = [(i + 1) * num_teacher // num_student - 1 for i in range(num_student)]
    else:
        gone = [integer("dropped", layer) for layer in dropped]
        wrong = [layer for layer in gone if not 0 <= layer < num_teacher]
        if wrong or len(set(gone)) != len(gone):
            refuse("dropped", f"different layers from 0 to {num_teacher - 1}", gone)
        teacher_layers = [layer for layer in range(num_teacher) if layer not in gone]
        if len(teacher_layers) != num_student:
            raise ValueError(
                f"num_student={num_student}, but num_teacher={num_teacher} without the {len(gone)} layers in "
                f"dropped leaves {len(teacher_layers)}"
            )
    first = (num_student - 1) % every
    return {layer: teacher_layers[layer] for layer in range(first, num_student, every)}


def layer_pairs_of(plan: PruningPlan, *, every: int = 1) -> dict[int, int]:
    """layer_pairs() of a student that `plan` cut: each layer with the teacher's layer that it was.

    Args:
        plan: a PruningPlan of make_plan() or PruningPlan.load().
        every: see layer_pairs().
    """
    if integer("every", every) < 1:
        refuse("every", "1 or more", every)
    kept = [entry.layer for entry in plan.layers]
    return {layer: kept[layer] for layer in range((len(kept) - 1) % every, len(kept), every)}
