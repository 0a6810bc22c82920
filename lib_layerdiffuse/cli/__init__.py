"""The command line: its arguments, its commands, and the models that they work with."""
