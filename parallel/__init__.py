"""Where ranks are and how bytes move: process groups, placement, exchange. Knows nothing of experts' arithmetic."""
