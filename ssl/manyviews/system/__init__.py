"""Operating system and processes: ranks, signals, files, hardware, console."""
