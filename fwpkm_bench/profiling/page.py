"""What people read of a profile: the table on the screen."""

import pandas as pd

from fwpkm_bench.report import print_table


def print_phases(phases: pd.DataFrame) -> None:
    """The phases on the screen, those that take the longest first."""
    headings = ["phase", "ms", "95% interval", "share", "GFLOP/s", "GB/s", "x roofline", "bound"]
    rows = []
    for _, row in phases.sort_values("ms_p50", ascending=False).iterrows():
        interval = "" if pd.isna(row["ms_lo"]) else f"{row['ms_lo']:,.4g} to {row['ms_hi']:,.4g}"
        rates = [row["tflop_per_s"] * 1e3, row["gb_per_s"], row["distance"]]
        cells = [row["phase"], f"{row['ms_p50']:,.4g}", interval, f"{row['share']:.1%}"]
        rows.append([*cells, *("" if pd.isna(v) else f"{v:,.3g}" for v in rates), row["bound"]])
    print_table(headings, rows)
