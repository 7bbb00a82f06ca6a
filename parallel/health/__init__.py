"""Who of the ranks is well: heartbeats, what each rank says of itself, who is to blame, which runs there are."""
