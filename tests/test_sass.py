"""tools/sass.py on a few lines of machine code whose answer is known."""

import pytest

from tools.sass import accesses, instructions, loads_together

LOAD = "LDG.E.128.CONSTANT R4, [R2.64]"


def code(*lines):
    """Each line (instruction, scoreboard that it sets or None, scoreboards that it waits for)."""
    out = []
    for i, (text, sets, waits) in enumerate(lines):
        control = (7 if sets is None else sets) << 5 | 7 << 8 | sum(1 << board for board in waits) << 11
        out.append(f"        /*{16 * i:04x}*/                   {text} ;   /* 0x{0x7981:016x} */")
        out.append(f"                                           /* 0x{control << 41:016x} */")
    return "\n".join(out)


def plain(text):
    return text, None, ()


def test_control_bits():
    first, second, third = instructions(
        code((LOAD, 3, ()), ("@!P0 FADD R1, R4, R5", None, (0, 3)), plain("EXIT"))
    )
    assert (first.sets, first.waits, first.name, first.guard) == (3, frozenset(), "LDG.E.128.CONSTANT", "")
    assert (second.sets, second.waits, second.name, second.guard) == (None, {0, 3}, "FADD", "@!P0")
    assert third.ends and not second.ends


def test_accesses():
    names = (
        "LDG.E.128 R4, [R2.64]", "LDG.E.U16 R4, [R2.64]", "LD.E R4, [R2.64]", "STG.E.EF.128 [R2.64], R4",
        "STG.E [R2.64], R4", "STG.E.64 [R2.64], R4", "LDS.128 R4, [R2]", "STL [R1], R2",
        "LDGSTS.E.128 [R1], [R2]",
    )  # fmt: skip
    counts = {"loads_128": 1, "narrow_loads": 2, "stores_128": 1, "narrow_stores": 2}
    assert accesses(code(*map(plain, names))) == counts


USE = "FADD R1, R4, R5"
LOOP = {  # what the body of a loop loads and waits for: the figure
    "together": (((LOAD, 0, ()), (LOAD, 0, ()), (LOAD, 1, ()), (USE, None, (0,)), (USE, None, (1,))), 3),
    "one by one": (((LOAD, 0, ()), (USE, None, (0,)), (LOAD, 0, ()), (USE, None, (0,))), 1),
    "the second before the first is used": (
        ((LOAD, 0, ()), (LOAD, 1, ()), (USE, None, (0,)), (LOAD, 0, ()), (USE, None, (0, 1))),
        2,
    ),
    "an address that waits": (((LOAD, 0, ()), (LOAD, 1, (0,)), (USE, None, (1,))), 1),
    "a wait by name": (
        ((LOAD, 0, ()), ("DEPBAR.LE SB0, 0x0", None, ()), (LOAD, 0, ()), (USE, None, (0,))),
        1,
    ),
    "narrow loads do not count": (((LOAD, 0, ()), ("LDG.E R4, [R2.64]", 0, ()), (USE, None, (0,))), 1),
}


@pytest.mark.parametrize("name", LOOP)
def test_loads_of_a_loop(name):
    body, expected = LOOP[name]
    loop = [plain("MOV R1, R2"), *body, plain("@P0 BRA 0x10"), plain("EXIT")]
    assert loads_together(code(*loop)) == expected
    assert loads_together(code(*body, plain("EXIT"))) == expected  # unrolled


def test_a_branch_between_the_loads():
    """One that only skips an addition lets them overlap; one by which the data is needed does not."""
    for waits, expected in (((), 2), ((0,), 1)):
        lines = [
            (LOAD, 0, ()),
            ("@P0 BRA 0x30", None, waits),
            (USE, None, (0,)),
            (LOAD, 1, ()),
            (USE, None, (0, 1)),
            plain("@P1 BRA 0x0"),
            plain("EXIT"),
        ]
        assert loads_together(code(*lines)) == expected


def test_the_worst_of_the_main_loops():
    """A second pass that loads one by one is seen, a loop over the rest of a row is not asked for more."""
    both, one = [(LOAD, 0, ())] * 4, [(LOAD, 0, ()), (USE, None, (0,))]
    first = [*both, (USE, None, (0,)), plain("@P0 BRA 0x0")]

    def after(second):
        return code(*first, *second, plain(f"@P0 BRA 0x{16 * len(first):x}"), plain("EXIT"))

    assert loads_together(after(one * 4)) == 1
    assert loads_together(after(one)) == 4
    assert loads_together(code(plain("EXIT"))) == 0
