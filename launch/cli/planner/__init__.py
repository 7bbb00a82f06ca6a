"""The verbs that ask the planner, and what they share: plan files, flags, tables."""
