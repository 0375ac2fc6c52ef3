"""`invmm-collect`: table, pictures and summary of finished or unfinished runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from invmm.cli.entry import run_command
from invmm.exits import HELP, Exit


def main() -> None:
    """Console script."""
    if code := run_command("invmm-collect", lambda: _collect(_parser().parse_args())):
        sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="invmm-collect",
        description="Collects the records of runs into scores.parquet and scores.csv, draws the "
        "gallery and the histogram, and prints the table. Running it again changes nothing.",
        epilog=HELP,
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--join", type=Path, metavar="FILE.csv", help="write the table of all runs into one file"
    )
    return parser


def _collect(arguments: argparse.Namespace) -> int:
    # So that a sweep's folder/* can be given, although Hydra leaves a file there.
    run_dirs = [path for path in arguments.run_dirs if not path.is_file()]
    if not run_dirs:
        raise ValueError("RUN_DIR names files only; give the folder of a run")
    for run_dir in run_dirs:
        if not (run_dir / "records").is_dir():
            raise ValueError(f"{run_dir} holds no records; give the folder of a run")

    from invmm.analysis.report import report
    from invmm.files import write_atomically
    from invmm.results.collect import score_table

    for run_dir in run_dirs:
        print(report(run_dir))
    if arguments.join:
        table = score_table(run_dirs).to_csv(index=False)
        write_atomically(arguments.join, table.encode())
        print(f"written: {arguments.join}")
    return Exit.DONE


if __name__ == "__main__":
    main()
