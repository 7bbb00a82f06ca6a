"""The expert backend of devices that have Triton kernels."""
