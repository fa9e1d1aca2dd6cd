"""Reasoning told apart from the answer: the rules on their own, and through models whose tags are tokens or text."""

from __future__ import annotations

import re
from collections import deque

import numpy as np
import pytest
import text_models
from scripted_models import END_OF_THINKING_TURN, TAG_TEXTS, TAG_TOKENS, make_model
from text_models import NORMISTRAL, byte_level, chat, copy, wrap
from tiny_models import END_THINK, THINK, THINKING_VOCABULARY, make_mistral
from tokenizers import AddedToken, Tokenizer

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import ReasoningMarkers, Template
from normistral.errors import UsageError
from normistral.runtime.chunks import Completion
from normistral.runtime.reasoning import ReasoningBudget, ReasoningSplitter, encode_close_tag

OPEN, CLOSE = "<think>", "</think>"

# name -> what the model writes, its reasoning, its answer
IN_BOTH_MODES = {
    "reasoning and answer": (" <think> Hm.</think> Oslo.", "Hm.", "Oslo."),
    "no reasoning": (" Oslo.\n", "", " Oslo.\n"),
    "nothing": ("", "", ""),
    "only blanks": (" \n", "", " \n"),
    "reasoning alone": ("<think>Hm.</think>", "Hm.", ""),
    "unclosed": (" <think> Hm, å", "Hm, å", ""),
    "almost closed": ("<think>a</thin</ think></THINK>", "a</thin</ think></THINK>", ""),
    "ends in half a close tag": ("<think>a</thi", "a</thi", ""),
    "a close tag behind its own beginning": ("<think>a<</</think>b", "a<</", "b"),
    "empty": ("<think></think>Oslo", "", "Oslo"),
    "empty but for blanks": ("<think>\n\n</think>\n\nOslo", "", "Oslo"),
    "nested": ("<think>a<think>b</think>c", "a<think>b", "c"),
    "nested at once": ("<think><think>b</think>c", "<think>b", "c"),
    "blanks before the tag": ("\n \t<think>a</think>b", "a", "b"),
    "blanks that are kept": ("<think>a \n b\n</think> c  d ", "a \n b\n", "c  d "),
    "Norwegian letters": ("<think>blåbær på</think>Østlandet 😀", "blåbær på", "Østlandet 😀"),
    "letters like a tag": (" <thin>k</think", "", " <thin>k</think"),
    "half an open tag": (" <thi", "", " <thi"),
    "a close tag at the beginning": (" </think> Oslo", "", "Oslo"),
    "a close tag alone": (" </think>", "", ""),
}
WITH_TAGS_IN_TEXT = {
    "tags in the answer": ("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
    "a close tag in an answer without reasoning": ("Oslo</think>!", "", "Oslo</think>!"),
    "an open tag behind a word": ("a <think>b</think>c", "", "a <think>b</think>c"),
    "an open tag behind a close tag at the beginning": ("</think><think>a", "", "<think>a"),
}
WITH_TAGS_AS_TOKENS = {
    "reasoning again": ("<think>a</think>b <think>c</think> d", "ac", "b  d"),
    "reasoning again, unclosed": ("<think>a</think>b<think> c", "a c", "b"),
    "a close tag in an answer without reasoning": ("Oslo</think>!", "", "Oslo!"),
    "a second close tag": ("<think>a</think>b</think>c", "a", "bc"),
    "an open tag behind a word": ("Oslo <think>a</think> er", "a", "Oslo  er"),
    "an open tag behind a close tag at the beginning": ("</think><think>a</think>b", "a", "b"),
}
AFTER_A_PROMPT = {  # name -> place, begun, and as above
    "inside": ("reasoning", False, " Hm.</think> Oslo", "Hm.", "Oslo"),
    "inside, closed at once": ("reasoning", False, "</think>Oslo", "", "Oslo"),
    "inside, unclosed": ("reasoning", False, "\nHm.", "Hm.", ""),
    "inside, an open tag again": ("reasoning", False, "<think>a</think>b", "<think>a", "b"),
    "in the midst of the reasoning": ("reasoning", True, " og så</think> b", " og så", "b"),
    "behind an empty reasoning": ("answer", False, "\n\nOslo ", "", "Oslo "),
    "in the midst of the answer": ("answer", True, " Oslo", "", " Oslo"),
}


def split(pieces, markers, *place, **begun):
    splitter = ReasoningSplitter(markers, *place, **begun)
    given = []
    for piece in pieces:
        tag = {OPEN: markers.open_id, CLOSE: markers.close_id}.get(piece)
        given.append(splitter.push(tag, "") if tag is not None else splitter.push(7, piece))
    given.append(splitter.flush())
    return tuple(map("".join, zip(*given, strict=True)))


def cuts(text):
    """The text whole, in single characters, and in two pieces in every way."""
    return [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]


def token_cuts(text):
    """The same with each tag as a piece of its own."""
    parts = [part for part in re.split(f"({OPEN}|{CLOSE})", text) if part]
    letters = [part for piece in parts for part in ([piece] if piece in (OPEN, CLOSE) else piece)]
    return [parts, letters]


@pytest.mark.parametrize("name", IN_BOTH_MODES | WITH_TAGS_IN_TEXT)
def test_tags_are_found_in_text_however_it_is_cut(name):
    written, reasoning, answer = (IN_BOTH_MODES | WITH_TAGS_IN_TEXT)[name]
    for pieces in cuts(written):
        assert split(pieces, TAG_TEXTS) == (reasoning, answer), pieces


@pytest.mark.parametrize("name", IN_BOTH_MODES | WITH_TAGS_AS_TOKENS)
def test_tags_are_tokens(name):
    written, reasoning, answer = (IN_BOTH_MODES | WITH_TAGS_AS_TOKENS)[name]
    for pieces in token_cuts(written):
        assert split(pieces, TAG_TOKENS) == (reasoning, answer), pieces


@pytest.mark.parametrize("name", AFTER_A_PROMPT)
def test_the_prompt_decides_where_the_text_goes_on(name):
    place, begun, written, reasoning, answer = AFTER_A_PROMPT[name]
    for pieces in cuts(written):
        assert split(pieces, TAG_TEXTS, place, begun=begun) == (reasoning, answer), pieces
    for pieces in token_cuts(written):
        assert split(pieces, TAG_TOKENS, place, begun=begun) == (reasoning, answer), pieces


def test_tags_spelled_with_ordinary_tokens_are_text_where_tags_are_tokens():
    for pieces in cuts(" <think>a</think>b"):
        splitter = ReasoningSplitter(TAG_TOKENS)
        given = [splitter.push(7, piece) for piece in pieces]
        assert tuple(map("".join, zip(*given, strict=True))) == ("", " <think>a</think>b")
    splitter = ReasoningSplitter(TAG_TOKENS, "reasoning")
    assert splitter.push(7, "a</think>b") == ("a</think>b", "")
    assert splitter.inside


def test_without_markers_everything_is_the_answer_at_once():
    splitter = ReasoningSplitter(None)
    assert [splitter.push(THINK, piece) for piece in (" ", "<think>", "</think>")] == [
        ("", " "),
        ("", "<think>"),
        ("", "</think>"),
    ]


def test_text_that_is_certain_is_not_held_back():
    splitter = ReasoningSplitter(TAG_TEXTS)
    assert splitter.push(7, " <think>Hm <b") == ("Hm <b", "")
    assert splitter.push(7, "</thi") == ("", "")
    assert splitter.push(7, "s") == ("</this", "")
    assert splitter.push(7, "</think>Oslo <") == ("", "Oslo <")


# --- the budget


@pytest.mark.parametrize(
    ("most", "inside", "ends"),
    [
        (None, [True] * 4, []),
        (0, [False, True, False, False], [1]),
        (0, [True, False], [0]),
        (2, [False, True, True, True, False], [3]),
        (2, [False, True, True, False, False], []),
        (1, [False, True, True, True, True, False, True, False, True], [2, 6, 8]),  # reasoning again: nothing is left
    ],
)
def test_the_budget_counts_tokens_inside_and_closes_once(most, inside, ends):
    forced: deque[int] = deque()
    budget = ReasoningBudget(most, [8, 9], forced)
    assert [i for i, place in enumerate(inside) if budget.watch(inside=place)] == ends
    assert list(forced) == [8, 9] * len(ends)


@pytest.mark.parametrize("kind", text_models.BACKENDS)
def test_every_tokenizer_can_write_a_close_tag_that_is_text(kind):
    tokenizer = wrap(text_models.BACKENDS[kind]())
    ids = encode_close_tag(TAG_TEXTS, tokenizer)
    before = tokenizer.encode("Hei", add_special_tokens=False)
    assert tokenizer.decode([*before, *ids]).endswith(CLOSE)


# --- through a model

MODES = {"tokens": TAG_TOKENS, "text": TAG_TEXTS}


@pytest.fixture(params=MODES)
def markers(request):
    return MODES[request.param]


def choose(token_id):
    logits = np.zeros(max(THINKING_VOCABULARY, token_id + 1), np.float32)
    logits[token_id] = 9.0
    return logits


def spell(tmp_path, text, markers, prompt=(7,), **changes):
    """A model that writes `text`, or these token ids, after a prompt, then the stop token."""
    model = make_model(tmp_path, choose, reasoning=markers, **changes)
    ids = [*(model.tokenizer.encode(text) if isinstance(text, str) else text), END_OF_THINKING_TURN]

    def next_logits(token_ids):
        written = max(0, len(token_ids) - len(prompt))
        return choose(ids[min(written, len(ids) - 1)])

    model._backend.next_logits = next_logits
    return model


def brood(tmp_path, markers, answer="Oslo", **changes):
    """A model that reasons for ever; once a close tag is there, it answers."""
    model = make_model(tmp_path, choose, reasoning=markers, **changes)
    opened = model.tokenizer.encode(OPEN)
    closed = list(encode_close_tag(markers, model.tokenizer))
    said = [*model.tokenizer.encode(answer), END_OF_THINKING_TURN]

    def next_logits(token_ids):
        written = list(token_ids[1:])  # after a prompt of one token
        ends = [i for i in range(len(written) + 1) if i >= len(closed) and written[i - len(closed) : i] == closed]
        if ends:
            return choose(said[min(len(written) - ends[0], len(said) - 1)])
        return choose(opened[len(written)] if len(written) < len(opened) else model.tokenizer.encode("a")[0])

    model._backend.next_logits = next_logits
    return model


def test_stream_and_generate_give_reasoning_and_answer(tmp_path, markers):
    model = spell(tmp_path, " <think> Blåbær? 😀</think> Ja, på Ærøy 😀", markers)
    completion = model.generate([7])
    assert (completion.reasoning, completion.text) == ("Blåbær? 😀", "Ja, på Ærøy 😀")
    assert (completion.finish_reason, completion.reasoning_open) == ("stop", False)
    chunks = list(model.stream([7]))
    assert Completion.from_chunks(chunks).text == completion.text
    assert all("�" not in chunk.text + chunk.reasoning for chunk in chunks)
    assert len([chunk for chunk in chunks if chunk.reasoning]) > 5  # streamed, not gathered
    first_said = next(i for i, chunk in enumerate(chunks) if chunk.text)
    assert {chunk.reasoning_open for chunk in chunks[:first_said] if chunk.reasoning} == {True}
    assert not any(chunk.reasoning or chunk.reasoning_open for chunk in chunks[first_said:])


def test_a_chat_keeps_answers_and_shows_no_old_reasoning_to_the_model(tmp_path, markers):
    model = make_model(tmp_path, [" <think> Hm.</think> Oslo.", " Ja."], reasoning=markers)
    conversation = model.chat(system="Svar kort.")
    first = conversation.send("Hovedstad?")
    assert (first.reasoning, first.text) == ("Hm.", "Oslo.")
    prompts_from = len(model._backend.forwarded)
    second = conversation.send("Sikker?")
    assert (second.reasoning, second.text) == ("", " Ja.")
    assert [message["content"] for message in conversation.messages[1:]] == ["Hovedstad?", "Oslo.", "Sikker?", " Ja."]
    fed = [token for forward in model._backend.forwarded[prompts_from:] for token in forward]
    text = model.tokenizer.decode(fed, skip_special_tokens=False)
    assert "Oslo." in text
    assert "Hm." not in text
    assert "think>" not in text


def test_tags_of_ordinary_tokens_are_text_for_a_model_whose_tags_are_tokens(tmp_path):
    model = make_model(tmp_path, choose, reasoning=TAG_TOKENS)
    deaf = model.tokenizer.with_tokens_as_text(model.chat_template._encoder.control_tokens, at_start=False)
    ids = [THINK, *deaf.encode("a</think>b"), END_THINK, *deaf.encode("<think>c</think>")]
    completion = spell(tmp_path, ids, TAG_TOKENS).generate([7])
    assert (completion.reasoning, completion.text) == ("a</think>b", "<think>c</think>")


def test_tags_that_are_added_tokens_but_not_special_are_not_printed_either(tmp_path):
    model = spell(tmp_path, " <think> a<think></think> b", TAG_TOKENS)
    make_tags_plain(tmp_path / "tokenizer.json")
    model.tokenizer = type(model.tokenizer).from_folder(tmp_path)
    assert not model.tokenizer.is_special(THINK)
    completion = model.generate([7])
    assert (completion.reasoning, completion.text) == ("a<think>", "b")


def make_tags_plain(path):
    backend = Tokenizer.from_file(str(path))
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (OPEN, CLOSE)])
    backend.save(str(path))


def test_no_character_goes_across_the_border(tmp_path):
    half, other_half = make_model(tmp_path, choose, reasoning=TAG_TOKENS).tokenizer.encode("å")
    completion = spell(tmp_path, [THINK, half, END_THINK, other_half], TAG_TOKENS).generate([7])
    assert (completion.reasoning, completion.text) == ("\ufffd", "\ufffd")
    ids = [THINK, half, other_half, half, END_THINK, half, other_half]
    completion = spell(tmp_path, ids, TAG_TOKENS).generate([7])
    assert (completion.reasoning, completion.text) == ("å\ufffd", "å")


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_budget_closes_the_reasoning_and_the_answer_follows(tmp_path, markers, most):
    model = brood(tmp_path, markers)
    chunks = list(model.stream([7], max_reasoning_tokens=most, logprobs=0, draft="off"))
    completion = Completion.from_chunks(chunks)
    assert (completion.reasoning, completion.text, completion.finish_reason) == ("a" * most, "Oslo", "stop")
    assert not completion.reasoning_open
    opened, closed = model.tokenizer.encode(OPEN), list(encode_close_tag(markers, model.tokenizer))
    expected = [*opened, *model.tokenizer.encode("a" * most), *closed, *model.tokenizer.encode("Oslo")]
    assert completion.token_ids == (*expected, END_OF_THINKING_TURN)
    assert completion.timings.new_tokens == len(completion.token_ids) == len(completion.logprobs) == len(chunks)
    fed = [token for forward in model._backend.forwarded for token in forward]
    assert fed == [7, *expected]


def test_a_forced_tag_is_found_where_it_and_a_broken_character_before_it_are_spelled_in_bytes(tmp_path):
    tokenizer = wrap(text_models.sentencepiece("never"))
    closed = encode_close_tag(TAG_TEXTS, tokenizer)
    broken, said = tokenizer.token_id("<0xE2>"), tokenizer.encode("Oslo", add_special_tokens=False)
    assert tokenizer.token_text(closed[0]) == "<0x3C>"
    # What stands in the places of forced tokens is never asked for.
    ids = [*tokenizer.encode(f"{OPEN}Hm", add_special_tokens=False), *([broken] * 4)]
    inside = len(ids) - len(tokenizer.encode(OPEN, add_special_tokens=False))
    model = spell(tmp_path, [*ids, *closed, *said], TAG_TEXTS)
    model.tokenizer = tokenizer
    completion = model.generate([7], max_reasoning_tokens=inside - 1, draft="off")
    assert completion.reasoning == "Hm" + "\ufffd" * 4
    assert completion.text == "Oslo"


def test_without_a_budget_it_reasons_until_the_end(tmp_path, markers):
    completion = brood(tmp_path, markers).generate([7], max_new_tokens=40)
    assert (completion.text, completion.finish_reason, completion.reasoning_open) == ("", "length", True)
    assert completion.reasoning == "a" * (40 - (1 if markers is TAG_TOKENS else len(OPEN)))


def test_a_budget_that_is_not_used_up_changes_nothing(tmp_path, markers):
    model = spell(tmp_path, "<think>Hm.</think>Oslo", markers)
    budget = len("Hm.") + (0 if markers is TAG_TOKENS else len(CLOSE))
    assert model.generate([7], max_reasoning_tokens=budget).token_ids == model.generate([7]).token_ids


def test_a_budget_of_nothing_closes_what_the_prompt_opened_before_the_first_token(tmp_path, markers):
    prompt = [7, *make_model(tmp_path, choose, reasoning=markers).tokenizer.encode(f"{OPEN}\n")]
    closed = list(encode_close_tag(markers, make_model(tmp_path, choose, reasoning=markers).tokenizer))
    model = spell(tmp_path, [*([9] * len(closed)), 60], markers, prompt=prompt)
    completion = model.generate(prompt, max_reasoning_tokens=0)
    assert completion.token_ids == (*closed, 60, END_OF_THINKING_TURN)
    assert completion.reasoning == ""
    assert completion.text == model.tokenizer.decode([60])


def test_max_new_tokens_ends_all_also_in_the_midst_of_a_forced_tag(tmp_path):
    model = brood(tmp_path, TAG_TEXTS)
    completion = model.generate([7], max_reasoning_tokens=2, max_new_tokens=len(OPEN) + 2 + 3)
    assert (completion.finish_reason, completion.text, completion.reasoning_open) == ("length", "", True)
    assert completion.reasoning == "aa</t"


def test_reasoning_again_after_the_budget_is_closed_at_once(tmp_path):
    ids = make_model(tmp_path, choose, reasoning=TAG_TOKENS).tokenizer.encode("bcd")
    b, c, d = ids
    # What stands in the places of forced tokens is never asked for.
    model = spell(tmp_path, [THINK, b, b, 0, c, THINK, 0, d], TAG_TOKENS)
    completion = model.generate([7], max_reasoning_tokens=2)
    assert (completion.reasoning, completion.text) == ("bb", "cd")
    assert completion.token_ids == (THINK, b, b, END_THINK, c, THINK, END_THINK, d, END_OF_THINKING_TURN)


def test_the_repetition_penalty_knows_forced_tokens(tmp_path):
    model = make_model(tmp_path, choose, reasoning=TAG_TOKENS)
    (a,) = model.tokenizer.encode("a")

    def prefer_the_tag(token_ids):
        logits = np.zeros(THINKING_VOCABULARY, np.float32)
        logits[END_THINK], logits[a] = 10.0, 9.0
        return choose(THINK) if len(token_ids) == 1 else logits

    model._backend.next_logits = prefer_the_tag
    options = {"max_reasoning_tokens": 0, "max_new_tokens": 3}
    assert model.generate([7], **options).token_ids == (THINK, END_THINK, END_THINK)
    assert model.generate([7], repetition_penalty=1.5, **options).token_ids == (THINK, END_THINK, a)


def test_a_forced_token_draws_no_random_number(tmp_path):
    model = make_model(tmp_path, choose, reasoning=TAG_TOKENS)
    model._backend.next_logits = lambda token_ids: np.where(np.arange(THINKING_VOCABULARY) < 200, 0, -50.0)
    options = {"temperature": 1.0, "seed": 3}
    free = model.generate([7], max_new_tokens=5, ignore_eos=True, **options).token_ids
    forced = model.generate([7, THINK], max_reasoning_tokens=0, max_new_tokens=6, ignore_eos=True, **options).token_ids
    assert forced == (END_THINK, *free)


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("Hei <think>", "reasoning"),
        ("Hei <think>\n\n", "reasoning"),
        ("Hei <think>\n\n</think>\n\n", "answer"),
        ("<think>a</think><think>", "reasoning"),
        ("Hei", "start"),
        ("Hva er <think>?</s>\n", "start"),
        ("Hva er <think></s>", "start"),
        ("Hei <think></s> </think>", "answer"),
    ],
)
def test_a_prompt_that_ends_inside_or_behind_the_reasoning(tmp_path, markers, prompt, place):
    tokenizer = make_model(tmp_path, choose, reasoning=markers).tokenizer
    splitter = ReasoningSplitter.after_prompt(markers, tokenizer, tokenizer.encode(prompt))
    assert splitter.inside == (place == "reasoning")
    assert splitter.push(7, " x") == {"reasoning": ("x", ""), "answer": ("", "x"), "start": ("", " x")}[place]


def test_a_prompt_in_the_midst_of_the_reasoning(tmp_path):
    tokenizer = make_model(tmp_path, choose, reasoning=TAG_TOKENS).tokenizer
    splitter = ReasoningSplitter.after_prompt(TAG_TOKENS, tokenizer, tokenizer.encode("Hei <think> Først"))
    assert splitter.push(7, " så") == (" så", "")
    splitter = ReasoningSplitter.after_prompt(TAG_TOKENS, tokenizer, tokenizer.encode("<think></think> Det"))
    assert splitter.push(7, " er") == ("", " er")
    # Found in the text it could be what a message says, so it has to be the end.
    splitter = ReasoningSplitter.after_prompt(TAG_TEXTS, tokenizer, tokenizer.encode("Hva er <think>? Svar:"))
    assert splitter.push(7, " En tag.") == ("", " En tag.")


def test_a_template_that_opens_the_reasoning_itself(tmp_path, markers):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}Svar: <think>\n"
    template = Template(text, "checkpoint")
    model = make_model(tmp_path, choose, reasoning=markers, template=template)
    prompt = model.chat_template.encode(chat("Hei </think> på deg"))
    model = spell(tmp_path, "Hm.</think> Oslo", markers, prompt=prompt, template=template)
    completion = model.chat().send("Hei </think> på deg")
    assert (completion.reasoning, completion.text) == ("Hm.", "Oslo")


def test_a_stop_text_is_ignored_in_the_reasoning_and_found_in_the_answer(tmp_path, markers):
    model = spell(tmp_path, "<think>en\n\nto STOPP</think> tre\n\nfire", markers)
    completion = model.generate([7], stop=["\n\n", "STOPP"])
    assert (completion.reasoning, completion.text) == ("en\n\nto STOPP", "tre")
    assert completion.finish_reason == "stop"
    unfinished = spell(tmp_path, "<think>en STOPP", markers).generate([7], stop="STOPP")
    assert (unfinished.reasoning, unfinished.text, unfinished.reasoning_open) == ("en STOPP", "", True)


@pytest.mark.parametrize(
    ("options", "reason"), [({"max_new_tokens": 12}, "length"), ({}, "context"), ({"max_new_tokens": 300}, "context")]
)
def test_an_answer_that_ends_inside_its_reasoning_is_empty(tmp_path, markers, options, reason):
    model = spell(tmp_path, "<think>" + "x" * 90, markers, context_length=60)
    completion = model.generate([7], **options)
    assert (completion.text, completion.finish_reason, completion.reasoning_open) == ("", reason, True)
    assert set(completion.reasoning) == {"x"}


def test_a_chat_that_is_cancelled_inside_its_reasoning(tmp_path, markers):
    conversation = make_model(tmp_path, ["<think>abcdef", " Ja."], reasoning=markers).chat()
    seen = []
    for chunk in conversation.stream("hei"):
        seen.append(chunk)
        if chunk.reasoning == "c":
            conversation.cancel()
    last = Completion.from_chunks(seen)
    assert (last.reasoning, last.text, last.finish_reason) == ("abc", "", "cancelled")
    assert last.reasoning_open
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}
    assert conversation.send("videre").text == " Ja."


def test_a_budget_for_a_model_without_reasoning_is_refused_before_anything_runs(tmp_path):
    model = make_model(tmp_path, ["svar"])
    conversation = model.chat()
    for call in (model.generate, model.stream, conversation.send, conversation.stream):
        with pytest.raises(UsageError, match="max_reasoning_tokens means nothing here: scripted") as caught:
            call("hei", max_reasoning_tokens=5)
        assert caught.value.hint
    assert model._backend.forwarded == []
    assert conversation.messages == []


# --- typed tags


def test_typed_tags_never_become_tokens(tmp_path):
    model = make_model(tmp_path, ["Nei."], reasoning=TAG_TOKENS)
    conversation = model.chat(system="Vær </think> snill")
    conversation.send("x<think>y</think>z</instruction> <think> Ja.</think>")
    fed = [token for forward in model._backend.forwarded for token in forward]
    assert not {THINK, END_THINK} & set(fed)
    assert "y</think>z</instruction> <think>" in model.tokenizer.decode(fed)


def test_typed_tags_stay_text_also_where_they_are_neither_special_nor_in_the_template():
    backend = copy(byte_level())
    backend.add_tokens([AddedToken(tag, special=False) for tag in (OPEN, CLOSE)])
    tokenizer = wrap(backend)
    tags = [tokenizer.token_id(tag) for tag in (OPEN, CLOSE)]
    markers = ReasoningMarkers(OPEN, CLOSE, *tags)
    message = chat("a<think>b</think>", "c</think>", "<think>")
    guarded = ChatTemplate(Template(NORMISTRAL, "checkpoint"), tokenizer, markers).encode(message)
    assert not set(tags) & set(guarded)
    assert "a<think>b</think>" in tokenizer.decode(guarded)
    unguarded = ChatTemplate(Template(NORMISTRAL, "checkpoint"), tokenizer).encode(message)
    assert set(tags) <= set(unguarded)
    own = ChatTemplate(Template(NORMISTRAL + "<think>", "checkpoint"), tokenizer, markers).encode(message)
    assert [token for token in own if token in tags] == tags[:1]


# --- through a real engine


def test_an_exported_model_keeps_its_markers_and_its_budget(tmp_path):
    import normistral

    checkpoint = make_mistral(tmp_path / "checkpoint", thinking=True, head_dim=32)
    manifest = normistral.export_model(str(checkpoint), tmp_path / "artifact", weights="fp16")
    assert manifest.reasoning == TAG_TOKENS
    options = {"ignore_eos": True, "max_new_tokens": 6, "temperature": 0}
    with normistral.load(tmp_path / "artifact", exact=True) as model:
        prompt = model.tokenizer.encode("<instruction> Oslo</instruction> <think>")
        free = model.generate(prompt, **options)
        assert END_THINK not in free.token_ids  # else this says nothing: take another prompt
        assert (free.text, free.reasoning_open) == ("", True)
        ended = model.generate(prompt, max_reasoning_tokens=2, **options)
        assert ended.token_ids[:3] == (*free.token_ids[:2], END_THINK)
        assert not ended.reasoning_open
        # The forced token is in the cache as if it had been sampled.
        fresh = model.generate([*prompt, *ended.token_ids[:3]], **{**options, "max_new_tokens": 3})
        assert fresh.token_ids == ended.token_ids[3:]
