"""Fast-weight product key memory (arXiv 2601.00671).

`FwPKM` is the layer, `fwpkm` the memory as a function; `reference.py` is the definition.
"""

from .functional import FwPKMOutput, fwpkm
from .module import FwPKM
from .settings import MemorySettings, Settings
from .state import FwPKMState

LAYER = FwPKM

__all__ = ["LAYER", "FwPKM", "FwPKMOutput", "FwPKMState", "MemorySettings", "Settings", "fwpkm"]
