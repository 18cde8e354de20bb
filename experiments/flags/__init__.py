"""From the fields of parts to flags, and back: names, values, help page, grid, flag files."""
