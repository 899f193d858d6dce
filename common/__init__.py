"""What every other folder stands on: the command line, files, bounds, devices."""
