"""The embedded data set: the standard library's docstrings, labelled with the chapter of their module.

Every machine with Python has it, so the first run needs no download. The task: read a docstring and say which
chapter of the Python Library Reference its module is described in. The module's own name is replaced by the
word "module" in the text, because "email" or "socket" alone would give many answers away. Doctest blocks are
dropped, near-duplicates removed, and the split is by a hash of the text, so no evaluation text has a twin in
training. The texts differ a little between versions of Python, so compare scores within one version only.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from ranktune.errors import DataError
from ranktune.tasks.duplicates import distinct, words

MIN_CHARACTERS, MAX_CHARACTERS, MIN_WORDS = 40, 600, 6

# Chapters of the Library Reference with enough docstrings in Python's own source in every version from 3.10
# to 3.13; small neighbours are merged. Modules that a version does not have are passed over. Left out:
# chapters with too few (functional programming, cryptography, multimedia, packaging), superseded modules, and
# IDLE, which is a program.
CHAPTERS = {
    "text processing and internationalization": (
        "difflib gettext locale re rlcompleter sre_compile sre_constants sre_parse string stringprep textwrap"
    ),
    "binary data": "codecs encodings struct",
    "data types": (
        "_collections_abc _pydatetime _strptime _weakrefset bisect calendar collections copy datetime enum "
        "graphlib heapq pprint reprlib types weakref zoneinfo"
    ),
    "numeric and mathematical": "_pydecimal _pylong decimal fractions numbers random statistics",
    "file and directory access": (
        "filecmp fileinput fnmatch genericpath glob linecache ntpath pathlib posixpath shutil stat tempfile"
    ),
    "data persistence and file formats": (
        "_compat_pickle configparser copyreg csv dbm netrc pickle plistlib shelve sqlite3 tomllib"
    ),
    "compression and archiving": "_compression bz2 gzip lzma tarfile zipfile",
    "operating system services and command line": (
        "_pyio argparse ctypes curses getopt getpass io logging optparse os platform"
    ),
    "concurrent execution": "_threading_local concurrent multiprocessing queue sched subprocess threading",
    "networking and interprocess communication": "asyncio selectors signal socket ssl",
    "internet data handling": "base64 email json mailbox mimetypes quopri",
    "structured markup": "_markupbase html xml",
    "internet protocols": (
        "ftplib http imaplib ipaddress nturl2path poplib smtplib socketserver urllib uuid webbrowser wsgiref xmlrpc"
    ),
    "program frameworks": "cmd shlex turtle",
    "graphical user interfaces": "tkinter",
    "development tools": "doctest pydoc typing unittest",
    "debugging and profiling": "bdb cProfile pdb profile pstats timeit trace tracemalloc",
    "runtime services": (
        "__future__ _py_abc _sitebuiltins abc contextlib dataclasses inspect site sysconfig traceback warnings"
    ),
    "interpreters and importing": "code codeop importlib modulefinder pkgutil runpy zipimport",
    "language services": (
        "ast compileall dis keyword opcode pickletools py_compile pyclbr symtable tabnanny token tokenize"
    ),
}

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_DOCTEST = re.compile(r"^[ \t]*>>> .*\n?(?:[ \t]*\S.*\n?)*", re.MULTILINE)  # a prompt, up to the next blank line


@dataclass(frozen=True)
class Docstring:
    """One example: the cleaned text, its chapter, and the top-level module it was found in."""

    text: str
    chapter: str
    module: str


@cache
def docstrings() -> tuple[Docstring, ...]:
    """Return the examples of this Python, without near-duplicates, always in the same order.

    Raises DataError where the standard library comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        Docstring(text, chapter, module)
        for chapter, modules in CHAPTERS.items()
        for module in modules.split()
        for file in _source_files(root, module)
        for text in _texts(file, module)
    ]
    if not found:
        raise DataError(
            f"data.source: 'stdlib-docstrings' needs the standard library's source files, and {root} has none. Use "
            "a Python that ships them, or give a file of your own."
        )
    return tuple(found[position] for position in distinct([example.text for example in found]))


def in_evaluation(text: str, fraction: float) -> bool:
    """Whether `text` belongs to the evaluation split.

    A hash of its words, so the same everywhere and for ever.
    """
    digest = blake2b(" ".join(words(text)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def clean(docstring: str, module: str) -> str:
    """Return the text a model reads.

    No doctests, one space between words, `module`'s name masked, not too long.
    """
    text = " ".join(_DOCTEST.sub("", docstring).split())
    text = re.sub(rf"\b{re.escape(module)}\b", "module", text, flags=re.IGNORECASE)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rsplit(" ", 1)[0]


def _source_files(root: Path, module: str) -> list[Path]:
    single = root / f"{module}.py"
    if single.is_file():
        return [single]
    files = (root / module).rglob("*.py")
    return sorted(file for file in files if _TEST_FOLDERS.isdisjoint(file.relative_to(root).parts))


def _texts(file: Path, module: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold escapes that newer compilers warn about
        tree = ast.parse(file.read_bytes())
    for docstring in _docstrings_below(tree):
        text = clean(docstring, module)
        if len(text) >= MIN_CHARACTERS and len(words(text)) >= MIN_WORDS:
            yield text


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    # Statements only: walking the expressions too would take five times as long.
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.AST):
                yield from _docstrings_below(child)
