"""Which rows go where: counts that all ranks know, waves, messages and the orders of rows in them."""
