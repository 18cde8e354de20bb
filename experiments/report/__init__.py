"""What the folders of runs and sweeps show: tables, pictures, event files."""
