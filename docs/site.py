"""What the site has beyond the pages of this folder: hooks of mkdocs."""

import re

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md, which stands at the root of the repository."""
    with open("CONTRIBUTING.md", encoding="utf-8") as file:
        files.append(File.generated(config, "contributing.md", content=file.read()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links to the repository's root to pages, and leave out what marks a fence for tests."""
    markdown = markdown.replace("](../CONTRIBUTING.md", "](contributing.md")
    return re.sub(r"^```(sh|python) (?:network|gpu|long|install)$", r"```\1", markdown, flags=re.M)


def on_page_content(html: str, **_: object) -> str:
    """Keep an option on one line."""
    return re.sub(
        r"<code>(--[^<]{1,30})</code>", r'<code style="white-space: nowrap">\1</code>', html
    )


class AsMarkdown(griffe.Extension):
    """Docstrings as the site's parser reads them."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Name examples as a section, and end a line before code as a sentence does."""
        if obj.docstring:
            value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(
                r" ?::$", lambda m: "" if m[0] == " ::" else ":", value, flags=re.M
            )
