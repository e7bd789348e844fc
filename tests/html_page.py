"""What tests of the reports look at in a page."""

from html.parser import HTMLParser

VOID_TAGS = {"meta", "img", "input", "br", "hr", "link", "wbr"}


class Page(HTMLParser):
    """Every start tag with its attributes, the text, and whether all tags were closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text, self.balanced = [], [], "", True
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def assert_inert(html):
    """One balanced page under a strict policy that runs nothing and loads nothing."""
    page = Page(html)
    assert page.balanced and not page.open
    policy = [m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert "@import" not in html and "url(" not in html and "http://" not in html and "https://" not in html
    return page


def assert_accessible(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.named("a")} == set(ids)
    assert len(page.named("h1")) == 1 and page.named("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.named("img"))
    assert all("scope" in th for th in page.named("th"))
    assert all(svg.get("aria-hidden") == "true" or svg.get("aria-label") for svg in page.named("svg"))
