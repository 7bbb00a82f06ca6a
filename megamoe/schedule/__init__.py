"""What both the runtime and the planner use: the order of steps, how long they take; nothing here imports torch."""
