"""Training: from data and a configuration to a checkpoint. `python -m training --help`."""
