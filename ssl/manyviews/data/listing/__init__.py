"""Lists the images of a folder and their splits, and detects changed files."""
