"""Mixup, CenterNet targets and losses, and the federated loss give the recorded numbers."""


def test_functions_give_the_recorded_numbers(parity, numbers):
    rows = list(parity("parity_functions").compare_functions(numbers("parity_functions")))
    assert len(rows) == 16
    assert [row for row in rows if not row.passed] == []
