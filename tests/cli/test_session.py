# SPDX-License-Identifier: Apache-2.0
"""Sessions and conversations over an engine that plays back tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tilewright.cli.chat import Conversation
from tilewright.cli.session import Session

STOP = 0


class Letters:
    """A tokenizer whose tokens are the code points of single characters."""

    chat_template = "plain"

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, **_):
        return "".join(chr(i) for i in ids)

    def apply_chat_template(self, messages, **_):
        return "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:"


class Playback:
    """An engine that answers with fixed text and remembers its prompts."""

    def __init__(self, text: str, max_length: int) -> None:
        self.text, self.max_length, self.prompts = text, max_length, []

    def generate(self, ids, _, *, max_new_tokens, **__):
        self.prompts.append("".join(map(chr, ids)))
        yield from [ord(c) for c in self.text][:max_new_tokens]


def session(text: str, context: int = 100) -> Session:
    config = SimpleNamespace(eos_token_ids=(STOP,), max_position_embeddings=2048)
    return Session("model", SimpleNamespace(config=config), Letters(), engine=Playback(text, context))


def test_text_streams_until_the_stop_token():
    s = session("hello" + chr(STOP) + "never")
    assert "".join(s.generate([1, 2, 3], None, 50)) == "hello"
    assert (s.last.text, s.last.stopped_by) == ("hello", "stop token")
    assert (s.last.prompt_tokens, s.last.new_tokens) == (3, 6)


def test_a_stop_string_ends_the_text_before_itself():
    s = session("one. two. three")
    assert "".join(s.generate([1], None, 50, [". t"])) == "one"
    assert s.last.stopped_by == "stop string"


def test_the_length_limit_is_exact():
    s = session("abcdef")
    assert "".join(s.generate([1], None, 4)) == "abcd"
    assert (s.last.new_tokens, s.last.stopped_by) == (4, "length")


def test_speeds_leave_out_what_was_not_timed():
    s = session("a")
    list(s.generate([1, 2], None, 1))
    assert s.last.speeds()["decode_tokens_per_s"] is None
    assert s.last.speeds()["prefill_tokens_per_s"] > 0


@pytest.mark.parametrize(("ids", "new", "part"), [([], 1, "prompt is empty"), ([1] * 90, 11, "context of 100")])
def test_what_does_not_fit_is_said_with_the_numbers(ids, new, part):
    with pytest.raises(ValueError, match=part):
        list(session("a").generate(ids, None, new))


def test_prompt_and_new_tokens_may_fill_the_context_exactly():
    assert "".join(session("x" * 20).generate([1] * 90, None, 10)) == "x" * 10


def test_a_model_without_chat_template_says_what_to_use():
    s = session("a")
    s.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tw generate"):
        s.encode_chat([{"role": "user", "content": "hi"}])


def test_a_conversation_keeps_its_history_until_reset():
    talk = Conversation(session("", context=1000), "be brief", 10)
    talk.prompt("one")
    talk.answer("1")
    ids, dropped = talk.prompt("two")
    assert "".join(map(chr, ids)) == "s:be brief;u:one;a:1;u:two;a:"
    assert dropped == 0
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}]


def test_a_full_context_forgets_the_oldest_exchange_and_never_the_system_message():
    talk = Conversation(session("", context=50), "sys", 10)
    for question, answer in (("first question", "1"), ("second", "2")):
        talk.prompt(question)
        talk.answer(answer)
    ids, dropped = talk.prompt("third one")
    assert dropped == 2
    assert "".join(map(chr, ids)) == "s:sys;u:second;a:2;u:third one;a:"
    assert len(ids) + 10 <= 50


def test_a_message_too_long_alone_is_refused_and_leaves_the_conversation():
    talk = Conversation(session("", context=30), None, 10)
    talk.prompt("hi")
    talk.answer("yes")
    before = list(talk.messages)
    with pytest.raises(ValueError, match="shorten it"):
        talk.prompt("x" * 40)
    assert talk.messages == before
