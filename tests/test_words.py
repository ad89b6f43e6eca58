"""`.ci/words.py` finds the words that have to be read twice, and there are none."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("words", ROOT / ".ci" / "words.py")
assert SPEC is not None and SPEC.loader is not None
words = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(words)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("one bit a weight", "one bit per weight, and how many bits a weight has"),
        ("a row\n# an epoch", "a row per epoch"),
        ("accuracy over sparsity", "accuracy against sparsity, the mean over seeds"),
        ("a file that is too large is told", "two files that are told apart"),
        ("they go on with the rest", "they continue with the rest"),
        ("Plan: one node", "the plan: one node"),
        ("a name is no path", "there is no path, which is no longer"),
        ("ms a call", "ms per call"),
    ],
)
def test_a_word_is_found_and_its_better_is_not(wrong: str, right: str) -> None:
    assert len(words.found(wrong)) == 1 and words.found(right) == []


def test_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert words.main([]) == 0, capsys.readouterr().out
