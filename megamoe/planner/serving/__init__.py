"""A whole model that serves: attention, FLOPs, memory, the time of a step."""
