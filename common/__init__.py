"""The ground floor, imported by all other folders: command line, files, bounds, devices."""
