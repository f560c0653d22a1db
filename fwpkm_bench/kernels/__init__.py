"""Mathematics that two layers or more share."""
