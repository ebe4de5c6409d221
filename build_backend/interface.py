"""What Python and C++ must agree on, as a digest of each piece: the schema of an op, and the headers that say
what a number means by its place in a list.

The build writes them into the extension, `minitron_kernels/_native.py` holds those that Python was written
for, and a test compares that table with csrc/.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

NUMBERS = ("kl_loss/loss_options.h", "kl_loss/cpu/linear_plan.h")
_LITERALS = r'(?:"(?:[^"\\]|\\.)*"\s*)+'
_DEFINITION = re.compile(rf"\bm\.def\(\s*({_LITERALS})\)")


def schemas(csrc: Path) -> list[str]:
    """The schemas of all ops, as the sources define them."""
    found = []
    for path in sorted(csrc.rglob("*.c*")):
        if path.suffix in (".cpp", ".cu"):
            for literals in _DEFINITION.findall(path.read_text()):
                found.append("".join(re.findall(r'"([^"]*)"', literals)))
    return found


def interface(csrc: Path) -> dict[str, str]:
    """Name of an op or of a header -> eight hexadecimal digits. Comments and spaces do not count."""
    pieces = {schema.partition("(")[0]: schema for schema in schemas(csrc)}
    for path in filter(Path.is_file, (csrc / header for header in NUMBERS)):
        pieces[str(path.relative_to(csrc))] = re.sub(r"//.*", "", path.read_text())
    digests = ((name, zlib.crc32("".join(text.split()).encode())) for name, text in sorted(pieces.items()))
    return {name: f"{digest:08x}" for name, digest in digests}
