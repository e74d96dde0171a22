"""Measurements: contestants checked against float64 oracles, then timed side by side."""
