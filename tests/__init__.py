"""Claims about megamoe, each checked against the oracle or the contract."""
