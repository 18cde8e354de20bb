"""Drivers: they parse flags, run the library and write files."""
