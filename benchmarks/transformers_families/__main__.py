"""python -m benchmarks.transformers_families, from the root of the repository."""

from benchmarks.command import run


def main() -> int:
    from benchmarks.transformers_families.page import main as write_page  # brings transformers, which may not be there

    return write_page()


if __name__ == "__main__":
    run(main)
