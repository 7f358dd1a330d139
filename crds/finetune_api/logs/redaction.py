"""Replaces what looks like a secret in a line of a log.

Our own code logs no secret. But libraries put URLs, headers and whole answers of servers into their errors, and an
error may say what a user wrote. So each line passes through here last. A secret in an unknown shape gets through: this
is the second net, not the first.
"""

import re

MASK = "***"

_PARTS = r"(?:api|access|private|signing|secret|session|auth)"
_NAMES = (
    r"(?!(?:pad|eos|bos|unk|mask)[-_])"  # names of a tokenizer's tokens
    rf"(?:[A-Za-z0-9]{{1,24}}[-_]){{0,6}}(?:{_PARTS}[-_]?){{0,4}}"  # bounded: a line of any length takes linear time
    rf"(?:{_PARTS}[-_]?key|token|secret|password|passwd|signature|credential)"
)

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A PEM block, whole or cut off.
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), MASK),
    # Schemes of the Authorization header; AWS' own has its parts by name, below.
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/-]{16,}=*", re.IGNORECASE), rf"\1 {MASK}"),
    # User and password of a URL.
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,15}://)[^\s/@:]{0,256}:[^\s/@]{1,1024}@", re.IGNORECASE), rf"\1{MASK}@"),
    # Tokens whose beginning says what they are: JWT, Hugging Face, AWS, GitHub, Weights & Biases.
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"), MASK),
    (re.compile(r"\b(?:hf|gh[pousr]|wandb|sk|glpat)[_-][A-Za-z0-9_-]{16,}"), MASK),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), MASK),
    # name=value and "name": "value", as in queries, environments and JSON.
    (re.compile(rf"""(\b{_NAMES}["']?\s*[=:]\s*["']?)[^\s"'&,;]{{6,}}""", re.IGNORECASE), rf"\1{MASK}"),
)


def redact(text: str) -> str:
    """Returns a text in which everything that looks like a secret is replaced by ***."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
