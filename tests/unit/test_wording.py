import pytest

from proxydet.wording import counted


@pytest.mark.parametrize(("number", "text"), [(0, "0 boxes"), (1, "1 box"), (2, "2 boxes")])
def test_nouns_follow_their_number(number: int, text: str) -> None:
    assert counted(number, "box", "boxes") == text


def test_an_s_is_the_usual_plural() -> None:
    assert [counted(number, "tar") for number in (1, 3)] == ["1 tar", "3 tars"]
