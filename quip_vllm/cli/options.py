# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have."""

import argparse
import tempfile
from pathlib import Path

LONGEST = 4000
"""Letters of a line of which a file may have made a part."""


def add_trust(parser: argparse.ArgumentParser) -> None:
    """--trust-remote-code."""
    parser.add_argument("--trust-remote-code", action="store_true", help="let Python code of the model's files run")


def add_device(parser: argparse.ArgumentParser, does: str = "runs") -> None:
    """--device, on which the model does what `does` says."""
    text = f"where the model {does}, as torch names it: cpu (default), cuda"
    parser.add_argument("--device", default="cpu", help=text)


def printable(text: str) -> str:
    """A line for a terminal: what is no letter is escaped, and a very long one is cut, since files may have made it."""
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + " ..."


def check_writable(file: Path, option: str) -> None:
    """Raises ValueError where a file cannot be made; leaves nothing."""
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{option} is {file}: give a file in a folder that exists")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(
            f"{option} is {file}: nothing can be written there ({error.strerror}); give another file"
        ) from None
