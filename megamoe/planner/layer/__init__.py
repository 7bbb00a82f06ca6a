"""One expert-parallel layer: the rule, routing, how long it takes, what would hide its communication."""
