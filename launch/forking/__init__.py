"""Processes forked by a server that has imported torch already: whether that is the same as a process spawned."""
