"""A group of workers that comes back: the pool of workers, where they run, what befell them."""
