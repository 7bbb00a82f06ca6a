"""Fault drills: ranks struck at random moments, on links of their own or sharing a host's memory."""
