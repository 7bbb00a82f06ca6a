"""How rows move between ranks: pairs of sends and receives, all-to-all, and torch's process groups under both."""
