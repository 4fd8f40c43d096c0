"""Machinery of a run: training loop, precision, devices, checkpoints, tracking."""
