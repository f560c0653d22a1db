"""The memory benchmark for sequence models: what each memory costs, and what it can recall.

``fwpkm_bench.layers`` holds the layers themselves, to be imported by other people's models.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, layers/, sweeps/ and profiles/ stand beside this folder; in a wheel, inside it.
_here = Path(__file__).resolve().parent
if not (_here / "layers").is_dir():
    __path__.append(str(_here.parent))
