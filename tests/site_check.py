"""Every link within the built site leads somewhere: python tests/site_check.py out/site

Sphinx checks what is a reference to it; this reads the HTML, whatever it was made of: pages, anchors,
pictures, scripts. Links to other sites are not followed.
"""

import html.parser
import pathlib
import sys
import urllib.parse


class Page(html.parser.HTMLParser):
    """The anchors of a page, its links, and its headings."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.titles = {"", "top"}, [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        self.titles += tag == "h1"
        for name in ("href", "src"):
            if attributes.get(name):
                self.links.append(attributes[name])


def problems(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    if not pages:
        yield f"{site} has no page"
    for path, page in pages.items():
        generated = path.name in ("genindex.html", "py-modindex.html", "search.html") or "_modules" in path.parts
        if page.titles != 1 and not generated:
            yield f"{path}: {page.titles} titles (h1)"
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{path}: {link} is not there"
            elif target in pages and urllib.parse.unquote(url.fragment) not in pages[target].anchors:
                yield f"{path}: {link} has no such anchor"


if __name__ == "__main__":
    found = list(problems(pathlib.Path(sys.argv[1]).resolve()))
    print("\n".join(found) or "every link within the site holds")
    sys.exit(bool(found))
