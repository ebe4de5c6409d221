"""Which Triton kernels the calls of an op launch for several sizes of input, on any machine.

Run as a script with the name of the op, whose <op>/launches.py has SIZES, the first of which is the one to
compare with, and launch(size); prints JSON: [[name and hash of each kernel] for each size].
"""

import importlib
import json
import sys

from tools.offline_triton import compiling_for, target_of


def main(op):
    found = []
    for size in op.SIZES:
        with compiling_for(target_of("sm_90")) as compiled:
            op.launch(size)
        found.append(sorted({f"{kernel.metadata.name} {kernel.hash}" for kernel in compiled}))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(importlib.import_module(f"{sys.argv[1]}.launches"))
