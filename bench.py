"""The command line without installing: ``python bench.py sweep --seq 4k..128k``."""

from fwpkm_bench.cli import main

if __name__ == "__main__":
    main()
