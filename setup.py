"""What the metadata of a package has beside pyproject.toml: README.md as the package index shows it, and the URLs.

README.md refers to files beside it, which a package index does not have. With the address of the repository in
HF_EFCP_SOURCE_URL and a tag or commit in HF_EFCP_SOURCE_REF these links become absolute; without it they become text,
and pictures their descriptions.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def readme(text: str, url: str = "", ref: str = "main") -> str:
    """README.md without relative links.

    Args:
        text: README.md.
        url: The address of the repository; without one, links become their text.
        ref: The tag, branch or commit that links lead to.

    Returns:
        The text.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, words, place = link.groups()
        if url:
            return f"{picture}[{words}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/{ref}/{place})"
        return f"*(picture: {words})*" if picture else words

    return _LINK.sub(absolute, text)


if __name__ == "__main__":
    address, tag = os.environ.get("HF_EFCP_SOURCE_URL", ""), os.environ.get("HF_EFCP_SOURCE_REF", "main")
    setup(
        long_description=readme(Path(__file__).with_name("README.md").read_text(encoding="utf-8"), address, tag),
        long_description_content_type="text/markdown",
        project_urls={"Source": address} if address else {},
    )
