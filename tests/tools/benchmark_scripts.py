"""The folder benchmarks/, whose scripts and what they import are found from here on."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(FOLDER))  # last: gather, importance and kl_loss are the tests' folders too
