"""`invmm-doctor`: what works on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from invmm.cli.entry import run_command
from invmm.exits import HELP, Exit

DESCRIPTION = """
Tries what invmm needs on this machine and prints what works, what does not, and what was skipped
and why. Loads no model.
"""


def main() -> None:
    """Console script."""
    sys.exit(run_command("invmm-doctor", lambda: _examine(_parser().parse_args())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("invmm-doctor", description=DESCRIPTION, epilog=HELP)
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where runs are to be written"
    )
    return parser


def _examine(arguments: argparse.Namespace) -> int:
    from invmm.runtime.checks import can_measure, table
    from invmm.runtime.doctor import checks

    found = list(checks(arguments.out))
    print(table(found))
    is_fit = can_measure(found)
    print("\nimages can be measured here" if is_fit else "\nimages cannot be measured here")
    return Exit.DONE if is_fit else Exit.FAULTY


if __name__ == "__main__":
    main()
