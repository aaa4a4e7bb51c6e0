"""Which images lie in a folder, which of them are held out, and whether they are still the same."""
