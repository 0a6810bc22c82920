"""The one exception that is meant for the person who pressed Generate."""


class LayerDiffuseError(Exception):
    """Something the user can put right: what is wrong, with the values, and what to change."""
