"""`run_memory` as one opaque call for torch.compile, whose graph breaks around it.

Imported only while compiling: the decorator would bring the whole compiler along at every import.
"""

import torch

from .functional import run_memory

memory_opaque = torch.compiler.disable(run_memory)
