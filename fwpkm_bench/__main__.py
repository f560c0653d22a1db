"""``python -m fwpkm_bench``."""

from fwpkm_bench.cli import main

main()
