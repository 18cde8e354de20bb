"""A run is a sweep of one: from a command line to runs, programs, folders and their results."""
