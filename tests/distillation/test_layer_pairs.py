"""layer_pairs(): which layer of the teacher a layer of the student follows."""

import pytest

from minitron_kernels.distillation import layer_pairs


def test_layer_pairs():
    assert layer_pairs(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert layer_pairs(3, 6) == {0: 1, 1: 3, 2: 5} and layer_pairs(1, 5) == {0: 4}
    assert layer_pairs(16, 32, every=5) == {0: 1, 5: 11, 10: 21, 15: 31}
    assert layer_pairs(4, 6, dropped=[4, 3]) == {0: 0, 1: 1, 2: 2, 3: 5}
    assert layer_pairs(4, 6, dropped=[3, 4], every=2) == {1: 1, 3: 5}


@pytest.mark.parametrize(
    ("arguments", "dropped", "every", "message"),
    [
        ((6, 4), None, 1, "num_student=6 is more than num_teacher=4"),
        ((3, 6), [1, 2], 1, "num_student=3, but num_teacher=6 without the 2 layers in dropped leaves 4"),
        ((6, 6), [2], 1, "leaves 5"),  # as deep as its teacher, whatever was said
        ((4, 6), [3, 6], 1, "dropped must be different layers from 0 to 5"),
        ((4, 6), [3, 3], 1, "dropped must be different layers"),
        ((0, 6), None, 1, "num_student must be 1 or more"),
        ((3, 6), None, 0, "every must be 1 or more"),
    ],
)
def test_pairs_that_cannot_be(arguments, dropped, every, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(*arguments, dropped=dropped, every=every)
