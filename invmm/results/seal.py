"""The root hash of a run: one number for its config, its inputs and all that it found.

A run ends by listing the digest of each file that the same command makes again, and the root hash
over this list. Whoever has the root hash from elsewhere, from the output of the run or its tracker,
can tell whether anything in the folder was changed, added or taken away since.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invmm.files import read_file, write_atomically
from invmm.results.run_folder import RunFolder

_SEALED = ("config.json", "records/*/*", "free_samples/*", "gallery.png", "scores.png")
"""Tables are left out: they hold seconds, and follow from the records."""
_VOLATILE = ("seconds", "config_digest", "checksum")
"""How the keys of a record begin that another run of the same command need not repeat."""


def seal(folder: RunFolder) -> str:
    """Writes the digests of a run that has ended, and their root hash, into its manifest.json.

    Args:
        folder: of the run; runs of other shards may write there too.

    Returns:
        The root hash, 64 hex digits.
    """
    path = folder.path / "manifest.json"
    with folder.exclusive("manifest.json"):
        manifest = json.loads(path.read_bytes())
        manifest["contents"] = contents(folder.path)
        manifest["root_hash"] = root_hash(manifest)
        write_atomically(path, json.dumps(manifest, indent=1).encode())
    return manifest["root_hash"]


def contents(run_dir: Path) -> dict[str, str]:
    """File, as a path within the folder of a run, -> SHA-256 of what the same command repeats."""
    files = {path for pattern in _SEALED for path in run_dir.glob(pattern)}
    return {
        str(path.relative_to(run_dir)): _digest(path)
        for path in sorted(files)
        if not path.name.endswith((".tmp", ".lock"))
    }


def root_hash(manifest: Mapping[str, Any]) -> str:
    """Of what a manifest says: inputs, seed, and contents, with the config among them."""
    sealed = {name: manifest[name] for name in ("config_digest", "inputs", "seed", "contents")}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def seal_faults(run_dir: Path, manifest: Mapping[str, Any], expected: str | None) -> list[str]:
    """Files that are not those that the run listed at its end, one line each.

    Args:
        run_dir: folder of the run.
        manifest: of it.
        expected: the root hash, from elsewhere; None compares the files with the list alone, which
            whoever changes a file can change as well.
    """
    if expected is None and "contents" not in manifest:
        return []
    try:
        listed, root = dict(manifest["contents"]), root_hash(manifest)
    except (KeyError, TypeError, ValueError):
        return ["manifest.json has no root hash: the run did not end, or is of an older version"]
    faults, found = [], contents(run_dir)
    wanted = expected or manifest.get("root_hash")
    if root != wanted:
        faults.append(f"the root hash of manifest.json is {root}, expected is {wanted}")
    for name in sorted({*found, *listed}):
        if name not in found:
            faults.append(f"{name} is missing")
        elif name not in listed:
            faults.append(f"{name} is none of the run's files")
        elif found[name] != listed[name]:
            faults.append(f"{name} was altered")
    return faults


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a record, without what another run need not repeat."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return "not a file"
    content = read_file(path)
    if path.name == "record.json":
        try:
            record = json.loads(content)
            kept = {key: record[key] for key in record if not key.startswith(_VOLATILE)}
            content = json.dumps(kept, sort_keys=True).encode()
        except (ValueError, AttributeError, TypeError):
            pass  # damaged: its bytes are all that there is
    return hashlib.sha256(content).hexdigest()
