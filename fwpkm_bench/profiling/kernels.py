"""Triton's report of each kernel of a layer as a table: a module to run, with the layer and the file.

A process of its own: Triton decides once, when it is imported, whether it interprets or compiles.
"""

import dataclasses
import sys
from pathlib import Path

from fwpkm_bench.measure.compiled import report
from fwpkm_bench.profiling.folder import write_table

CAPABILITY = 90  # of the GPU to compile for: Hopper

if __name__ == "__main__":
    layer, table = sys.argv[1:]
    rows = [
        {"capability": CAPABILITY, **dataclasses.asdict(kernel)} for kernel in report([layer], CAPABILITY)
    ]
    write_table(Path(table), rows)
