"""The megamoe command: a file for each verb, and how all of them speak."""
