"""Checkpoints onto ranks: safetensors read by byte range, straight to where they stay, each rank its own experts."""
