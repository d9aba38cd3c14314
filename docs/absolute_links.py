"""Give the relative links and pictures of a Markdown page absolute addresses, in place.

A package index shows the README without the repository's other files:

    python docs/absolute_links.py README.md https://github.com/OWNER/NAME COMMIT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?://|#)(?P<target>[^)\s]+)\)")


def absolute(page: str, repository: str, commit: str) -> str:
    """Return a page whose relative links lead to the files of a commit, in a repository with the addresses of GitHub.

    Links with an address of their own, and those within the page, stay as they are.
    """

    def replaced(link: re.Match[str]) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({repository}/{kind}/{commit}/{link['target']})"

    return LINK.sub(replaced, page)


if __name__ == "__main__":
    file, repository, commit = sys.argv[1:]
    Path(file).write_text(absolute(Path(file).read_text(encoding="utf-8"), repository, commit), encoding="utf-8")
