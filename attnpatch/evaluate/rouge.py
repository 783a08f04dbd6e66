"""ROUGE-L as the ``rouge`` package (1.0.1) computes it, which LongBench uses: summary level, distinct words.

A text is cut into sentences at full stops. For each sentence of the reference, its longest common subsequence with
every sentence of the prediction is taken; the distinct words of all of them, over the distinct words of each text,
are recall and precision.  The package adds 1e-8 to the denominator of F; here a perfect answer is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(a: Sequence[str], b: Sequence[str]) -> set[str]:
    """Words of one longest common subsequence; ties go the package's way (a step back in ``b``)."""
    table = [[0] * (len(b) + 1)]
    for word in a:
        above, row = table[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    i, j, words = len(a), len(b), set()
    while i and j:
        if a[i - 1] == b[j - 1]:
            words.add(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l_f(prediction: str, reference: str) -> float:
    """ROUGE-L F of ``prediction`` against ``reference``, 0 to 1; 0 if either holds no word."""
    if not prediction.strip() or not reference.strip():
        return 0.0
    predicted, wanted = _sentences(prediction), _sentences(reference)
    if not predicted or not wanted:
        return 0.0
    common: set[str] = set()
    for sentence in wanted:
        for other in predicted:
            common |= _common(sentence, other)
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    return 2.0 * precision * recall / (precision + recall) if common else 0.0
