"""Texts from models on ranks that are started for them."""
