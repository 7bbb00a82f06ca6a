"""DeepSeek-V4's own checkpoint format: reading it, its expert layers, writing a small one."""
