"""Run by the web UI before it loads the extension. Nothing to install: every Forge has what LayerDiffuse imports."""
