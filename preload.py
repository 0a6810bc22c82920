"""Command-line options, read by the web UI before it parses them."""

from argparse import ArgumentParser


def preload(parser: ArgumentParser) -> None:
    """Add this extension's options."""
    parser.add_argument(
        "--layerdiffuse-models-dir",
        type=str,
        default=None,
        help="folder with the LayerDiffuse weight files: searched first, and downloads go there",
    )
