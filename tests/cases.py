"""The containment cases: what is tried, and for those that no test can try the reason.

A test's docstring begins with the numbers of the cases that it is about: "A13, A14: ...". `docs/cases.md` is made of
this list and of a run of those tests, by `make cases`; `test_cases.py` keeps the three together.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["CASES", "GROUPS", "WITHOUT_TEST", "Carrier", "carriers", "numbers"]

GROUPS = {
    "A": "Host files, and what the host itself reads and writes for a session",
    "B": "Secrets",
    "C": "Network and the way out",
    "D": "Other sessions",
    "E": "Processor, memory, disk, processes, lifetime",
    "F": "The terminal, and whatever shows results",
    "G": "The host's side against a kernel that lies",
    "H": "Privileges, the kernel's surface, and a boundary that is whole or none",
}

CASES = {
    "A1": "Files of the system and of its users, and the workspace by its place on the host, are opened",
    "A2": "The system's folders are written",
    "A3": "The root folder, and those above the session's own, are written",
    "A4": "Files, folders and devices are made in /dev",
    "A5": "Shared skills are changed",
    "A6": "The folder of another key is listed and opened",
    "A7": "A mount is taken off, made writable or covered",
    "A8": "The same from within a user namespace of the session's own",
    "A9": "A key is a path, a control sequence, a name of another system's, or hardly different from another key",
    "A10": "A key is the beginning of another key",
    "A11": "An earlier session left links where a sandbox might mount or make something",
    "A12": "A symbolic link stands in the place of a key's folder, before or after the host has looked",
    "A13": "A symbolic link is downloaded",
    "A14": "A file is reached through a folder that is a link",
    "A15": "A path that leads out of the session's folders is downloaded",
    "A16": "A file becomes a link, and a file again, while the host downloads it",
    "A17": "A folder on the way becomes a link, and a folder again, while the host reads or writes below it",
    "A18": "A named pipe is downloaded, which would never end",
    "A19": "A socket or device is downloaded, and a device made",
    "A20": "A file of eight tebibytes is downloaded",
    "A21": "A file of another mount gets a name among the session's own",
    "A22": "A set-user or set-group file is made, by every call that can",
    "A23": "Names hold control characters, no text at all, or as much as a name can",
    "A24": "Folders are hundreds deep, hold a hundred thousand files, or never end",
    "A25": "An archive holds paths that lead elsewhere, links and devices",
    "A26": "A session names the files that the host makes for it",
    "A27": "Open descriptors lead to the host's folders or network",
    "A28": "A file is opened relative to any descriptor there may be",
    "A29": "The first process's command line, root and descriptors tell places of the host",
    "A30": "Files that Python runs by their name lie in folders that the host works with",
    "A31": "Files that tools of the host run by their name are written into a folder that was bound",
    "A32": "The programs that every session runs are written",
    "A33": "A link stands where the host is about to save an image",
    "B1": "The host's environment is read",
    "B2": "The environments of other processes are read",
    "B3": "The session's memory is searched for a secret of the host's environment",
    "B4": "The host user's keyrings are asked",
    "B5": "The service account of a pod is read",
    "B6": "The token of the port is found and used for another session",
    "B7": "Tracebacks, variables or cores tell places and secrets of the host",
    "B8": "The host's errors and logs tell tokens and variables",
    "C1": "An address of the internet is reached",
    "C2": "A name is resolved, or a name service asked",
    "C3": "A listener on the host's loopback is reached",
    "C4": "An abstract socket of the host's is reached",
    "C5": "A virtual machine's socket is made, which no network namespace holds",
    "C6": "Sockets of other families and kinds are made",
    "C7": "Calls are made through io_uring, past the filter",
    "C8": "A cloud's metadata service is reached, directly and by the proxy",
    "C9": "The sockets of the host's services are opened",
    "C10": "The proxy is asked for loopback in other spellings",
    "C11": "The proxy is asked for names with NUL, line ends, spaces or escapes in them",
    "C12": "The proxy is asked for names that look like one that is listed",
    "C13": "A listed name leads to an address that is not public",
    "C14": "A name leads to a public address first and to a private one later",
    "C15": "The proxy is asked for other ports",
    "C16": "A request's host is not its target, or a second request hides behind the first",
    "C17": "A request can be read in two ways, or its head does not end",
    "C18": "TLS names another server than was asked for, none, or is no TLS",
    "C19": "Behind TLS a listed server of a shared network is asked for a neighbour's pages",
    "C20": "The list is empty, or means everybody",
    "C21": "The proxy is spoken to in SOCKS, or another protocol",
    "C22": "The proxy is gone",
    "C23": "A session uses the way of another",
    "C24": "A relay inside asks the proxy on for others",
    "C25": "Connections without number, without end, or without a word",
    "C26": "A listed host redirects to one that is not",
    "C27": "The proxy is passed by",
    "D1": "Processes of other sessions are listed",
    "D2": "Everything that has a number is killed",
    "D3": "Processes are traced",
    "D4": "Other sessions' processes are looked into by /proc",
    "D5": "System calls reach into other processes",
    "D6": "Shared memory, semaphores and queues of others are opened",
    "D7": "Temporary files of others are read",
    "D8": "Another session's socket is replaced or connected to",
    "D9": "Descriptors are left over from whom the session was forked from",
    "D10": "Two sessions draw the same random numbers",
    "D11": "Modules and builtins are spoiled for other sessions",
    "D12": "A session dies, in every way",
    "D13": "The supervisor is seen, signalled or traced",
    "D14": "A notebook server's interface leads to other kernels",
    "D15": "A session makes processes without end, and another one needs some",
    "D16": "Two sessions have one key",
    "D17": "The socket that sessions are asked for on is spoken to from inside",
    "D18": "The kernel's own lists tell of others",
    "E1": "Processes without end",
    "E2": "One piece of memory larger than the bound",
    "E3": "Many processes that together take more memory than the bound",
    "E4": "/tmp and /dev/shm are filled",
    "E5": "One file larger than the bound",
    "E6": "The host's disk is filled through the private folder",
    "E7": "Files without number",
    "E8": "Open files without number",
    "E9": "Threads without number",
    "E10": "A cell that takes too long and heeds the interrupt",
    "E11": "A cell that ignores, swallows or masks the interrupt",
    "E12": "A cell that is deep in machine code",
    "E13": "Daemons that have left their session and ignore signals",
    "E14": "Programs left in the background",
    "E15": "The kernel is killed in the middle of a cell",
    "E16": "The kernel exits, crashes or is told to quit",
    "E17": "All descriptors are closed",
    "E18": "The kernel stops itself",
    "E19": "Bounds are raised, and a better place in the queue is taken",
    "E20": "The host's process is killed",
    "E21": "The thread that started the container ends",
    "E22": "Hundreds of sessions and containers come and go",
    "E23": "A session burns all processors, and another one needs one",
    "E24": "A cell asks the user",
    "E25": "A sandbox fails while it is set up",
    "F1": "Text is typed into the host's terminal",
    "F2": "The same with a bit set that the kernel does not look at",
    "F3": "The terminal is driven by its other calls",
    "F4": "The terminal of the process is opened",
    "F5": "Output holds what terminals obey",
    "F6": "Errors, names, values and log entries hold what terminals obey",
    "F7": "Displayed HTML runs scripts and loads from elsewhere",
    "F8": "What is displayed as an image or text is a document with scripts",
    "G1": "A length of gigabytes, or none, is announced",
    "G2": "A frame is begun and not ended",
    "G3": "What is sent are no frames",
    "G4": "JSON that breaks its reader: depth, digits, numbers that are none, lone surrogates",
    "G5": "Frames that are right and do not belong there",
    "G6": "Data that runs when it is loaded",
    "G7": "Small messages without end",
    "G8": "Text without end",
    "G9": "Displays and images without end",
    "G10": "An image of more pixels than any memory holds",
    "G11": "An image that is none",
    "G12": "Exceptions whose text, chain or source is endless, or fails",
    "G13": "The kernel does not read what it is sent",
    "G14": "The socket that the host connects to is another one",
    "G15": "Descriptors are sent along without number",
    "G16": "Frames that speak for the host or for another session",
    "G17": "Strangers at the port: without a token, with a wrong one, silent, and many",
    "G18": "Line ends and control characters in what the host logs",
    "G19": "Any bytes whatever",
    "H1": "Capabilities, and ways to get some",
    "H2": "Set-user programs are run",
    "H3": "Namespaces are made and entered",
    "H4": "The calls that mount",
    "H5": "The calls that only an attack needs",
    "H6": "The calls of another instruction set",
    "H7": "The kernel's settings are written",
    "H8": "Devices that do harm",
    "H9": "A process inside is root on the host",
    "H10": "What is mounted writable is written though it was not allowed",
    "H11": "What people do in a notebook goes on working",
    "H12": "A layer is missing: nothing runs",
    "H13": "The boundary is, in everything that can be seen of it, the one that was meant",
    "H14": "A layer is taken away: the attempt succeeds, so the layer is what kept it",
    "H15": "Docker makes a container otherwise than it was asked to, or has a layer less",
}

WITHOUT_TEST = {
    "A31": "not prevented: what a session may write it may fill. `security.md` says not to run such tools there",
    "B5": "there is no engine for Kubernetes",
    "C19": "not preventable without ending TLS on the host, which actbox does not: `network.md` says so",
    "D14": "no notebook server is part of actbox",
    "F7": "no web viewer is part of actbox: HTML is handed to the caller as the text it is",
}

_NUMBERS = re.compile(r"([A-H]\d+(?:, [A-H]\d+)*)[:.;,]")


class Carrier(NamedTuple):
    """A test that is about cases: its file, without "test_" and ".py"; its function, without "test_"."""

    file: str
    name: str


def numbers(docstring: str | None) -> list[str]:
    """The cases that a test with this docstring is about."""
    found = _NUMBERS.match(docstring or "")
    return found[1].split(", ") if found else []


def carriers() -> dict[Carrier, list[str]]:
    """The tests of this suite that are about cases, with their numbers, read off the source."""
    found: dict[Carrier, list[str]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                own = numbers(ast.get_docstring(node))
                if own:
                    found[Carrier(path.stem.removeprefix("test_"), node.name.removeprefix("test_"))] = own
    return found
