"""Run: runs, steps and streams, and what drives them: a plan, or the model itself (the reference)."""
