"""What is measured. A workload is one file with `MODES`, `BATCHED`, `Settings` and `run(case)`.

``run`` gets a `Case` in the case's own process and returns a `Measurement`.
"""
