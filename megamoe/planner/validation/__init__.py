"""The planner held against measurements, and profiles fitted to them."""
