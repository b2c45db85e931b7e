"""A short part of the fuzz (tests/fuzz.py), and that it finds what it looks for."""

import fuzz
import fuzz_readers
import pytest


def test_damaged_files_end_in_errors_that_name_them():
    kinds = [kind for kind in fuzz_readers.KINDS if kind != "labels_of_val"]  # 0.4 s each
    tally, failures = fuzz.fuzz(12 * len(kinds), 1_000_000, kinds)
    assert not failures, failures
    assert all(results["refused"] >= 2 for results in tally.values()), tally


@pytest.mark.parametrize(
    ("read", "what"),
    [
        ("raise ValueError('odd')", "raised"),
        ("raise UserError('something is damaged')", "names no file"),
        ("bytearray(1 << 42)", "memory"),
        ("os.kill(os.getpid(), 11)", "died"),
        ("time.sleep(60)", "hung"),
    ],
)
def test_the_fuzz_finds_faults(read, what, monkeypatch):
    """Of a reader whose fault comes with the first damaged input."""
    monkeypatch.setattr(fuzz, "LIMIT", 0.5)
    monkeypatch.setenv("FUZZ_FAULT", read)
    _, failures = fuzz.fuzz(1, 0, ["faulty"])
    assert [failure[:3] for failure in failures] == [("faulty", 0, what)]
