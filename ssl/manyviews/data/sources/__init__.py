"""The data sets that a recipe can name, and any folder of images."""
