"""Released weight files: which there are, how they come, and whether they are whole."""
