"""What is asked for: raw values of panels and API calls, read into requests that the rest can trust."""

from lib_layerdiffuse.request.layers import Request

__all__ = ["Request"]
