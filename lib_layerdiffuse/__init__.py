"""Native transparent images and layers for Stable Diffusion (LayerDiffuse, arXiv 2402.17113)."""
