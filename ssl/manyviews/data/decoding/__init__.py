"""From the bytes of an image file to a uint8 square."""
