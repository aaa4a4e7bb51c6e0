"""A run is a folder: its recipe, metrics, checkpoints and health."""
