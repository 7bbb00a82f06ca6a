"""Text from models whose experts are spread over ranks: prompts, attention per sequence, ranks in step, sampling."""
