"""The kernels of one GPU and the layer on it: right first, then how long each takes beside torch and the ceilings."""
