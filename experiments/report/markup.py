"""HTML5 of one page that needs no other file, no network and no script.

Every function escapes the texts that it is given: `Html` is what has been through one of them.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NewType

from PIL import Image

Html = NewType("Html", str)

INCH = 96  # pixels of CSS
NUMBER = re.compile(r"[-−+]?\d|–$")
# Where "61.0, 77.5 (fine tune), 0.56 [0.51, 0.60]" is broken: at commas that are in no brackets.
BREAK = re.compile(r"(?<=, )(?![^(\[]*[)\]])")
NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # which HTML does not allow

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --band: #f3f5f7;
  --link: #0550ae;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --ink: #e6e9ed; --soft: #9aa4af; --line: #343b44; --band: #1a2028;
    --link: #79b8ff;
  }
  img { filter: brightness(0.88); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
main { max-width: 100rem; margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2.5rem) 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 {
  font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line);
}
p, ul { max-width: 80ch; }
a { color: var(--link); }
nav ul { columns: 22rem; max-width: none; padding-left: 1.2rem; }
pre {
  margin: 0.75rem 0; padding: 0.6rem 0.8rem; background: var(--band); border-radius: 6px;
  font-size: 0.85rem; white-space: pre-wrap;
}
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 0.6rem 2rem;
}
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
summary { cursor: pointer; color: var(--link); }
figure { margin: 1rem 0; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 80ch; margin-bottom: 0.4rem; }
.wide { overflow: auto; max-width: 100%; }
.wide:focus-visible { outline: 2px solid var(--link); }
img { display: block; max-width: 100%; height: auto; background: #fff; }
.sheet { max-height: 85vh; border: 1px solid var(--line); border-radius: 6px; width: fit-content; }
table {
  border-collapse: separate; border-spacing: 0; font-size: 0.875rem; line-height: 1.35;
  overflow-wrap: break-word;
}
th, td {
  padding: 0.35rem 0.6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); background: var(--paper);
}
thead th { position: sticky; top: 0; z-index: 1; background: var(--band); vertical-align: bottom; }
tbody th { position: sticky; left: 0; font-weight: 600; }
thead th:first-child { left: 0; z-index: 2; }
tbody tr:last-child > * { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td span { display: block; }
@media print {
  .wide { overflow: visible; max-height: none; }
  thead th, tbody th { position: static; }
}
"""


def escaped(text: str) -> Html:
    """As content or as the value of an attribute. What UTF-8 or HTML has no place for, such as the
    bytes of a folder's name that are no text, is replaced."""
    encodable = text.encode("utf-8", "replace").decode()
    return Html(html.escape(NO_TEXT.sub("\ufffd", encodable)))


def paragraph(text: str) -> Html:
    return Html(f"<p>{escaped(text)}</p>\n")


def typed(text: str) -> Html:
    """What is typed into a terminal."""
    return Html(f"<pre><code>{escaped(text)}</code></pre>\n")


def items(texts: Iterable[str]) -> Html:
    """A list."""
    lines = "".join(f"<li>{escaped(text)}</li>\n" for text in texts)
    return Html(f"<ul>\n{lines}</ul>\n")


def terms(meanings: Mapping[str, str]) -> Html:
    """What each word means, side by side where there is room."""
    lines = "".join(
        f"<div><dt>{escaped(term)}</dt><dd>{escaped(meaning)}</dd></div>\n"
        for term, meaning in meanings.items()
    )
    return Html(f"<dl>\n{lines}</dl>\n")


def folded(heading: str, *content: Html) -> Html:
    """What is shown only to who asks for it."""
    return Html(f"<details>\n<summary>{escaped(heading)}</summary>\n{''.join(content)}</details>\n")


def sheet(caption: str, cells: Sequence[Sequence[str]]) -> Html:
    """A table whose headings, and first column, stay in sight while it is scrolled.

    Columns in which every cell begins with a number, or is – or empty, are aligned to the right,
    with the parts of a cell below each other.

    Args:
      caption: above it.
      cells: line by line, the headings first.
    """
    headings, *lines = cells
    kinds = [
        ' class="number"' if _numbers(column[1:]) else "" for column in zip(*cells, strict=True)
    ]

    def row(line: Sequence[str], first: str, others: str) -> str:
        found = ""
        for at, (text, kind) in enumerate(zip(line, kinds, strict=True)):
            start = others if at else first
            content = _broken(text) if kind and start == "td" else escaped(text)
            found += f"<{start}{kind}>{content}</{start.partition(' ')[0]}>"
        return f"<tr>{found}</tr>\n"

    head = row(headings, 'th scope="col"', 'th scope="col"')
    body = "".join(row(line, 'th scope="row"', "td") for line in lines)
    return Html(
        f"<figure>\n<figcaption>{escaped(caption)}</figcaption>\n{_wide(caption, 'wide sheet')}"
        f"<table>\n<thead>\n{head}</thead>\n<tbody>\n{body}</tbody>\n</table></div>\n</figure>\n"
    )


def _numbers(column: Sequence[str]) -> bool:
    some = [text for text in column if text]
    return bool(some) and all(NUMBER.match(text) for text in some)


def _broken(text: str) -> str:
    parts = [escaped(part) for part in BREAK.split(text)]
    return "".join(f"<span>{part}</span>" for part in parts) if len(parts) > 1 else parts[0]


def _wide(name: str, classes: str) -> str:
    """The start of what is scrolled sideways on a narrow screen, by keys too."""
    return f'<div class="{classes}" tabindex="0" role="region" aria-label="{escaped(name)}">'


def picture(png: bytes, alt: str, caption: str) -> Html:
    """A picture of the size that it was drawn for; on narrow screens down to 3/4 of it.

    Args:
      png: the content of the file.
      alt: what there is to see, for who does not see it.
      caption: below it.

    Raises:
      ValueError: it is no PNG.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            across, down = image.size
            dots = image.info.get("dpi", (INCH, INCH))[0] or INCH
    except OSError as error:
        raise ValueError(f"is no PNG ({error})") from None
    width, height = (max(round(side / dots * INCH), 1) for side in (across, down))
    data = base64.b64encode(png).decode()
    return Html(
        f'<figure>\n{_wide(caption, "wide")}<img alt="{escaped(alt)}" width="{width}" '
        f'height="{height}" style="min-width: {3 * width // 4}px" '
        f'src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{escaped(caption)}</figcaption>\n</figure>\n"
    )


def page(title: str, lead: Sequence[Html], sections: Sequence[tuple[str, Sequence[Html]]]) -> str:
    """The whole file.

    Args:
      title: of the page.
      lead: what stands above all sections.
      sections: their headings and content.
    """
    # The policy makes the browser enforce what the page promises: nothing is loaded, nothing run.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    links, body = "", ""
    for number, (heading, content) in enumerate(sections, 1):
        links += f'<li><a href="#part-{number}">{escaped(heading)}</a></li>\n'
        body += f'<section>\n<h2 id="part-{number}">{escaped(heading)}</h2>\n'
        body += f"{''.join(content)}</section>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escaped(title)}</h1>\n{''.join(lead)}"
        f'<nav aria-label="Contents">\n<ul>\n{links}</ul>\n</nav>\n'
        f"{body}</main>\n</body>\n</html>\n"
    )
