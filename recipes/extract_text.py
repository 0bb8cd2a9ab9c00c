"""Get the text out of PDF, HTML and mail files; what can't be read is set aside, and why.

Run it with `parflow run recipes/extract_text.py --source 'inbox/**/*' --max-failures 0.1 --workers 2`; it needs
`pip install pypdf beautifulsoup4`.
"""

from __future__ import annotations

import email.policy
import io
import os
from email.message import EmailMessage, Message
from typing import Any

import parflow as pf

KINDS = {".pdf": "pdf", ".html": "html", ".htm": "html", ".eml": "mail"}


def kind_of(path: str, data: bytes) -> str:
    """Tell a document's kind by its content where that's plain, else by its name."""
    if not data:
        raise ValueError("the file is empty")
    if data[:1024].find(b"%PDF-") >= 0:
        return "pdf"
    kind = KINDS.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise ValueError(f"neither PDF nor any of {', '.join(KINDS)}")
    return kind


def pdf_text(data: bytes) -> str:
    """Return the text of all pages. Encrypted files are read if the empty password opens them."""
    from pypdf import PdfReader

    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(data)).pages)


def html_text(data: bytes | str) -> str:
    """Return what a browser shows as text, one line an element."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(data, "html.parser")
    for hidden in soup(["script", "style", "template"]):
        hidden.decompose()
    text = soup.get_text("\n", strip=True)
    if "\0" in text:
        raise ValueError("binary data, not HTML")
    return text


def part_text(part: Message) -> str:
    """Return the text of a mail's part, whatever its charset is called: senders get that wrong."""
    data = part.get_payload(decode=True)
    assert isinstance(data, bytes)
    for charset in (part.get_content_charset("utf-8"), "utf-8"):
        try:
            return data.decode(charset)
        except (LookupError, UnicodeError):  # an unknown charset, or other bytes than promised
            continue
    return data.decode("windows-1252", "replace")


def mail_text(data: bytes) -> tuple[str, list[str]]:
    """Return subject and body of a mail, plain text before HTML, and its attachments' names."""
    mail = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    if not mail.keys():
        raise ValueError("no mail: it has no header")
    body = mail.get_body(("plain", "html"))
    text = "" if body is None else part_text(body)
    if body is not None and body.get_content_subtype() == "html":
        text = html_text(text)
    attached = [part.get_filename() or part.get_content_type() for part in mail.iter_attachments()]
    return f"{mail.get('subject', '')}\n\n{text}".strip(), attached


@pf.task(timeout="2min", memory="1GiB")
def extract(doc: pf.Document) -> dict[str, Any]:
    """Return what a file says, and what kind of file it is."""
    kind = kind_of(doc.path, doc.data)
    attachments: list[str] = []
    if kind == "mail":
        text, attachments = mail_text(doc.data)
    else:
        text = {"pdf": pdf_text, "html": html_text}[kind](doc.data)
    return {"path": doc.path, "kind": kind, "characters": len(text), "attachments": attachments, "text": text}


@pf.workflow
def extract_text(source: str, out: str = "out/text") -> Any:
    """Write the text of all files to ``out``, as JSON Lines, and return how many there are of each kind."""
    texts = pf.read_files(source, mode="bytes", chunk_bytes="1MiB").map(extract)
    texts.write_jsonl(out)
    return texts.reduce(pf.counter("kind"))
