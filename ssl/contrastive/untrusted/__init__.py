"""Files that anybody may have written: opened without harm, read up to a bound, refused in a sentence."""
