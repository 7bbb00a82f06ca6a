"""The mega-kernel on one device: virtual ranks against the staged kernels, and how long a call takes."""
