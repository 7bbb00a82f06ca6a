"""What each stage does, in a process of its own: generators that take a plan.Task and yield findings."""
