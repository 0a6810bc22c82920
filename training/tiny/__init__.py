"""The tiny world: models laid out like SD1.5 and SDXL, small enough to be trained on a laptop."""
