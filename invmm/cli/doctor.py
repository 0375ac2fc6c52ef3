"""`invmm-doctor`: what works on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from invmm.cli.command import EXIT_INTERRUPTED, EXIT_USER_ERROR

DESCRIPTION = """
Tries what invmm needs on this machine and prints what works, what does not, and what was skipped
and why. Loads no model.
"""
EPILOG = "Exit codes: 0 images can be measured here, 2 they cannot."


def main() -> None:
    """Console script."""
    parser = argparse.ArgumentParser("invmm-doctor", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where runs are to be written"
    )
    arguments = parser.parse_args()
    from invmm.runtime.doctor import can_measure, checks, table

    try:
        found = list(checks(arguments.out))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    print(table(found))
    is_fit = can_measure(found)
    print("\nimages can be measured here" if is_fit else "\nimages cannot be measured here")
    sys.exit(0 if is_fit else EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
