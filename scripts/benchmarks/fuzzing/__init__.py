"""What `benchmark.py fuzz` damages, how, and what reads it."""
