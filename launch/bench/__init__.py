"""The layer measured: serial, overlapped, computing alone, communicating alone; the rule's sweep."""
