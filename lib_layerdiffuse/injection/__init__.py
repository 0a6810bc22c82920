"""What goes into a UNet: the content of a weight file, and functions that a host calls while it samples."""
