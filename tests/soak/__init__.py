"""Faults injected into real evaluations, many times: `python -m tests.soak`, or `make soak`."""
