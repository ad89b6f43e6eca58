"""Words that have to be read twice: where they are in documentation, code and settings, and what to write instead.

python .ci/words.py [FILE ...] looks at all files of ours, or at those given, and exits with 1 if there is one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    *("*.md", "Makefile", "docs/**/*.md", "pl_sparse/**/*.py", "pl_sparse/**/*.html", "pl_sparse/**/*.js"),
    *("conf/**/*.yaml", "benchmarks/**/*.py", "examples/*", "tests/*.py", "tests/data/*.txt"),
)
COUNTED = (
    r"(?:rows?|bits?|bytes|lines?|values?|weights?|steps?|runs?|epochs?|points?|numbers?|milliseconds|ms|kilobytes|MACs|"
    r"GPUs?|seconds|updates|rounds?|passes|products|iterations|samples?|removed|multiply-accumulates|gradients|threads?|"
    r"process(?:es)?|jobs?|masks?|one folder|\d+ %|images?|tokens?)"
)
UNIT = (
    r"(?:weight|model|epoch|layer|run|sample|step|unit|seed|batch|round|second|bit|level|method|instruction|machine|"
    r"tensor|row|channel|process|device|optimizer step|image|token|call)"
)
METRIC = r"(?:accuracy|accuracies|loss|losses|errors?|density|sparsity|metrics?)"
COST = r"(?:sparsity|sparsities|epochs|steps|time|density|size|latency|macs|cost)"
NO_MORE = r"(?:longer|such|more|other|one|limit|(?:fast|slow|small|larg|spars|cheap|clos)er)\b"
WORDS = [  # what is found, and what to write
    (rf"(?<!many\s)\b{COUNTED} an? {UNIT}\b(?! (?:has|of|may|reads|wrote|whose|that))", "'per': one row per model"),
    (rf"\b{METRIC} over (?:the )?{COST}\b", "'against': accuracy against sparsity"),
    (r"\bcores over\b", "'divided by'"),
    (r"\b(?:is|are|was|were|be) (?:not )?told\b(?! apart)", "'reported', 'named', 'a warning': things are not told"),
    (r"\b(?:is|are) said (?:to\b|[.;])", "who reports it, and where"),
    (r"\btells? (?:methods|models|runs)\b", "'distinguishes'"),
    (r"\bleaves? it at that\b", "what happens, and what does not"),
    (r"\b(?:go(?:es|ing)?|went) on with\b", "'resume', 'continue'"),
    (r"\bgives? (?:the|a|its) \w+ up\b", "'releases'"),
    (r"\bwhat zeros pay\b", "what is gained"),
    (r"\bmakes? sure of\b", "'is at least', 'ensures'"),
    (r"\bnone is asked for\b", "'is not set'"),
    (r"\bPlan:", "'not tried here', or leave it out"),
    (rf"(?<![Tt]here\s)\b(?:is|was) no (?!{NO_MORE})\w", "'is not a'"),
    (r"\bsays so\b", "what is reported, and where"),
]
ITSELF = {"words.py", "test_words.py"}
BUILT = {"_build", "generated"}


def found(text: str) -> list[tuple[int, str, str]]:
    """Line, words and what to write instead, of a file's text.

    >>> found("One bit a weight.")
    [(1, 'bit a weight', "'per': one row per model")]
    >>> found("One bit per weight, and how many bits a weight has.")
    []
    """
    return [
        (text.count("\n", 0, match.start()) + 1, match[0], advice)
        for pattern, advice in WORDS
        for match in re.finditer(pattern.replace(" ", r"\s+(?:# *)?"), text)  # also across lines
    ]


def main(names: list[str]) -> int:
    ours = {path for glob in FILES for path in ROOT.glob(glob) if path.is_file()}
    files = [Path(name) for name in names] or sorted(ours)
    lines = [
        f"{file}:{line}: {words!r}: {advice}"
        for file in files
        if not {*file.parts} & (ITSELF | BUILT)
        for line, words, advice in found(file.read_text(encoding="utf-8"))
    ]
    print("\n".join(lines) or f"{len(files)} files: none of the words")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
