"""Whether a change is right, and whether it truly helped: two sides, measured in turns."""
