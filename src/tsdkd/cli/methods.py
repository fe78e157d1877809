"""`tsdkd methods`."""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """List the methods."""
    argparse.ArgumentParser(prog="tsdkd methods", description="List the methods, with options and papers.").parse_args(
        argv
    )

    from ..run.train import print_methods  # torch from here on

    print_methods()
    return 0
