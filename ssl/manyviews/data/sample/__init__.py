"""Files of the bundled sample, and the script that makes them."""
