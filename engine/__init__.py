"""Infrastructure of a run: checkpoints, devices, processes, files, metrics."""
