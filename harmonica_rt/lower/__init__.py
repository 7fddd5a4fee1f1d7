"""Lower: a step graph -> something that runs."""
