"""Files of JSON lines are read up to where a crash cut them, and go on from there."""

from __future__ import annotations

import pytest

from proxydet.json_lines import JsonLines


@pytest.mark.parametrize("cut", ["", "{", '{"iteration": 3, "losses": {"a": 1}'])
def test_a_cut_line_is_passed_over_and_removed_on_going_on(tmp_path, cut):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    records = [{"iteration": number, "losses": {"a": 0.5}} for number in (1, 2)]
    for record in records:
        lines.append(record)
    with lines.path.open("a") as file:
        file.write(cut)
    assert list(lines.read()) == records
    lines.forget_after(1)
    lines.append(records[1])
    assert list(lines.read()) == records


def test_a_file_that_is_not_there_has_no_records(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert list(lines.read()) == []
    lines.forget_after(0)
    assert not lines.path.exists()
