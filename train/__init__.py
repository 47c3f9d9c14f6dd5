"""Training of teachers and cache routers with Lightning: `python -m train fit --config FILE`."""
