"""Which implementation runs a problem, what ran, and why."""
