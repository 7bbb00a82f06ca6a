"""Starts ranks and says what they do: command line, local ranks, the demo."""
