"""Training of what the extension injects and decodes with. Never imported by the extension."""
