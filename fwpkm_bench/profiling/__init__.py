"""Where a case's time and memory go: phases, traces, the host, memory over time."""
