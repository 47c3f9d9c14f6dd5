"""Measurements quoted in the README: `python -m benchmarks.NAME` writes results/NAME.json."""
