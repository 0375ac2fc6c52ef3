"""Pages and pictures of `experiments/`, which lie outside docs/ and belong to the site too.

So that one relative link serves both here and where the repository is read.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds each study's README, as its page, and the pictures beside it."""
    root = Path(config.docs_dir).parent
    for path in sorted(root.glob("experiments/*/*")):
        if path.name != "README.md" and path.suffix != ".png":
            continue
        place = path.relative_to(root)
        page = place.with_name("index.html") if path.suffix == ".md" else place
        files.append(
            File(
                f"../{place.as_posix()}",
                src_dir=config.docs_dir,
                dest_dir=config.site_dir,
                use_directory_urls=config.use_directory_urls,
                dest_uri=page.as_posix(),
                inclusion=InclusionLevel.INCLUDED,  # not hidden, though its path begins with a dot
            )
        )
    return files
