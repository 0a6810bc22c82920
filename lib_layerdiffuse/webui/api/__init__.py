"""HTTP routes beside those of the web UI."""
