"""The transparent decoder made fast on a processor: `FastDecoder(net)` answers as `net` does.

On a processor the plain network waits for memory: a feature map of a wide level is far larger than the caches (1024²
pixels, 32 channels, float32: 128 MiB), and each layer reads and writes it several times. And attention of heads that
are eight numbers wide is slow in every library. So:

- `decoder.py` walks through the network. A layer's answer is made strip by strip: its rows are read, normalised,
  activated and convolved while they are in a core's cache. Every map is whole before the next layer reads it, so that
  normalisation goes by the whole picture and no border shows; its mean and variance are gathered strip by strip too.
  Where the weights are more than the pixels, a piece has all rows of some channels, and each weight is read once.
- `threads.py` has the threads that take one piece after the other. In them torch has one thread itself: one that
  shares each operation spins after it, and holds the core that another piece needs.
- `attention.py` decides between torch's attention and the kernel in `kernels.py`, which numba compiles at the first
  large picture after an installation and keeps on disk. Without numba everything else stays as it is.
- Small pictures are left to the plain network, which is as fast there.

All is float32, whatever the weights are in. A change of `nets/decoder.py` must be made in `decoder.py` here too;
`tests/test_cpu.py` compares the two. What each part is worth is in benchmarks/RESULTS.md.
"""

from lib_layerdiffuse.cpu.decoder import FastDecoder

__all__ = ["FastDecoder"]
