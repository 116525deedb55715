"""What a package has beside pyproject.toml: its folders, README.md as the package index shows it, and the URLs.

The programs of `recipes/` and their YAML files are in a wheel as `hf_efcp/recipes/`, for the command `hf-efcp`.

README.md refers to files beside it, which a package index does not have. With the address of the repository in
HF_EFCP_SOURCE_URL and a tag or commit in HF_EFCP_SOURCE_REF these links become absolute; without it they become text,
and pictures their descriptions.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def packages() -> list[str]:
    """The folders of modules, and those of YAML files.

    Returns:
        Their names in a wheel, with dots.
    """
    programs = {
        path.parent
        for pattern in ("*.py", "benchmarks/*.py", "configs/**/*.yaml")
        for path in (ROOT / "recipes").glob(pattern)
    }
    named = sorted("hf_efcp." + ".".join(folder.relative_to(ROOT).parts) for folder in programs)
    return [*find_packages(str(ROOT), include=["hf_efcp", "hf_efcp.*"]), *named]


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
        packages=packages(),
        long_description=readme((ROOT / "README.md").read_text(encoding="utf-8"), address, tag),
        long_description_content_type="text/markdown",
        project_urls={"Source": address} if address else {},
    )
