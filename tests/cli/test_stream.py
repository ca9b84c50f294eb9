# SPDX-License-Identifier: Apache-2.0
"""Streaming gives the text that decoding everything at once gives, and never a half character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.cli.stream import TextStream, stream_text


def bytes_decode(ids: list[int]) -> str:
    """A tokenizer whose tokens are single bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def words_decode(ids: list[int]) -> str:
    """A tokenizer that trims the space at a text's start, as sentencepiece ones do."""
    return "".join(f" w{i}" for i in ids).lstrip()


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(bytes_decode, stop)
    return list(stream_text(text.encode("utf-8"), stream)), stream


@given(st.text(max_size=40))
def test_pieces_join_to_the_whole_text(text):
    got, stream = pieces(text)
    assert "".join(got) == text == stream.text
    assert all(got)


@given(st.text("aé漢🙂", min_size=1, max_size=20))
def test_no_piece_holds_a_half_character(text):
    assert all("�" not in piece for piece in pieces(text)[0])


def test_a_text_that_ends_inside_a_character_shows_it_at_the_end():
    stream = TextStream(bytes_decode)
    assert "".join(stream_text("aé".encode()[:-1], stream)) == "a�"


@given(
    st.text(st.sampled_from("ab"), max_size=12),
    st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_at_their_first_occurrence(text, stop):
    got, stream = pieces(text, tuple(stop))
    ends = [text.find(one) for one in stop if one in text]
    # The stream sees one character at a time, so the stop string that is complete first wins.
    complete = [text.find(one) + len(one) for one in stop if one in text]
    if not ends:
        assert "".join(got) == text
        assert not stream.stopped
    else:
        first = min(complete)
        winners = [text.find(one) for one in stop if one in text and text.find(one) + len(one) == first]
        assert "".join(got) == text[: min(winners)]
        assert stream.stopped


def test_trimming_tokenizers_keep_their_spaces():
    stream = TextStream(words_decode)
    assert "".join(stream_text([1, 2, 3, 4], stream)) == "w1 w2 w3 w4"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(bytes_decode, ("",))
