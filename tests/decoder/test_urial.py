"""URIAL prompts: the published file form, how turns are written behind it, and how answers are cleaned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aligned_models import reference_model
from hypothesis import given
from hypothesis import strategies as st
from models import byte_tokenizer, tiny_decoder
from transformers import AutoTokenizer

from raindecode import RAIN, URIAL, ChatFormat, Conversation, Decoder, Policy, Sampling, testbed
from raindecode.errors import ConfigError, PromptError, PromptFileError
from raindecode.text import TextFilter

BLOCK = "# Instruction\n\nBe kind.\n\n# Query:\n```\nHi?\n```\n\n# Answer:\n```\nHello!\n\nBye.\n```"
INLINE = "# Instruction\n\nBe kind.\n\n# Query:\n```Hi?```\n \n# Answer:\n```\nHello!\n```\n\n\n"
SHARED = Path(__file__).resolve().parents[3] / "shared"


# ---- what a prompt looks like -----------------------------------------------------------------------------------------
def test_queries_on_lines_are_written_as_the_published_code_writes_them_now() -> None:
    urial = URIAL.parse(BLOCK)
    assert urial.instruction == "Be kind."
    assert urial.examples == (("Hi?", "Hello!\n\nBye."),)
    assert urial.render("Why?") == BLOCK + "\n\n# Query:\n```\nWhy?\n```\n\n\n# Answer:\n```\n"
    talk = Conversation("Why?", (("Who?", " Me. "),))
    first = "\n\n# Query:\n```\nWho?\n```\n\n\n# Answer:\n```\nMe.\n```\n"
    assert urial.render(talk) == BLOCK + first + "\n\n# Query:\n```\nWhy?\n```\n\n\n# Answer:\n```\n"
    assert urial.stop == ("# Query", "# User")
    assert urial.removed == ("```", "<|endoftext|>")


def test_queries_on_one_line_are_written_as_it_did_at_first() -> None:
    urial = URIAL.parse(INLINE)
    assert urial.prefix == INLINE.strip()
    assert urial.render("Why?") == INLINE.strip() + "\n# Query:\n```Why?```\n\n# Answer:\n```\n"


def test_other_headings_are_kept() -> None:
    urial = URIAL.parse(BLOCK.replace("Query:", "Person").replace("Answer:", "Reply:"))
    assert urial.render("Why?").endswith("\n\n# Person\n```\nWhy?\n```\n\n\n# Reply:\n```\n")
    assert urial.stop == ("# Query", "# User", "# Person")


def test_a_system_text_stands_behind_the_examples_so_that_these_stay_constant() -> None:
    text = URIAL.parse(BLOCK).render(Conversation("Why?", (), "Be brief."))
    assert text == BLOCK + "\n\n# Instruction\n\nBe brief.\n\n# Query:\n```\nWhy?\n```\n\n\n# Answer:\n```\n"


def test_an_answer_may_hold_code_and_headings_of_its_own() -> None:
    reply = "Run this:\n```python\n# Say hello:\nprint('hello')\n```\nDone."
    text = f"# Instruction\nBe kind.\n# Query:\n```\nHi?\n```\n# Answer:\n```\n{reply}\n```"
    assert URIAL.parse(text).examples == (("Hi?", reply),)


def test_a_prompt_of_ones_own() -> None:
    urial = URIAL.of("Be kind.", [("Hi?", "Hello!\n\nBye.")])
    assert urial == URIAL.parse(BLOCK)
    assert URIAL.of("Be kind.").examples == ()
    with pytest.raises(PromptFileError, match="triple back-ticks"):
        URIAL.of("Be ```kind```.")
    with pytest.raises(PromptFileError, match="no text"):
        URIAL.of("Be kind.", [("", "Hello!")])


def test_the_default_prompt() -> None:
    urial = URIAL.default()
    assert len(urial.examples) == 3
    assert 700 < len(urial.prefix.split()) < 1000
    assert all(reply[-1] in ".!?" for _, reply in urial.examples)


@pytest.mark.parametrize(
    ("name", "examples", "tokens", "asked"),
    [
        ("inst_1k", 3, 2710, 2765), ("inst_1k_v3", 3, 2719, 2778), ("inst_1shot", 1, 1522, 1577), ("inst_help", 5, 4130, 4189),
        ("inst_only", 0, 482, 541),
    ],
)  # fmt: skip
def test_published_files(name: str, examples: int, tokens: int, asked: int) -> None:
    """Token counts are golden: of a prompt, and of a conversation of two turns. The tokenizer has 512 tokens."""
    file, model = SHARED / "data" / "urial_prompts" / f"{name}.txt", SHARED / "weights" / "llama2xs-279k"
    if not file.exists() or not model.exists():
        pytest.skip("the published prompt files, or a model whose tokenizer counts them, are not on this machine")
    urial = URIAL.load(file)
    assert len(urial.examples) == examples
    text = file.read_text(encoding="utf-8").strip()
    assert urial.prefix == text
    tokenizer = AutoTokenizer.from_pretrained(model)
    one = urial.render("What is a list?")
    two = urial.render(Conversation("And a set?", (("What is a list?", "A list is a row of things."),)))
    assert one.startswith(text)
    assert one.endswith("# Answer:\n```\n")
    assert two.count("# Query:") == one.count("# Query:") + 1
    assert (len(tokenizer(one)["input_ids"]), len(tokenizer(two)["input_ids"])) == (tokens, asked)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no heading"),
        ("just text", "before its first heading, in line 1"),
        ("# Query:\n```\nHi?\n```\n# Answer:\n```\nHello!\n```", "does not begin with an instruction"),
        ("# Instruction\n\n# Query:\n```\nHi?\n```\n# Answer:\n```\nHello!\n```", "does not begin with an instruction"),
        ("# Instruction\nBe kind.\n# Query:\n```\nHi?\n```", "line 3: '# Query:' has no answer"),
        ("# Instruction\nBe kind.\n# Query:\n```\nHi?\n# Answer:\n```\nHello!\n```", "in line 4 that are not closed"),
        ("# Instruction\nBe kind.\n# Query:\n```\nHi?\n```\n# Answer:\n```\nHello!", "in line 8 that are not closed"),
        (
            "# Instruction\nBe kind.\n# Query:\nHi?\n# Answer:\n```\nHello!\n```",
            "line 3: '# Query:' has no text in triple",
        ),
        (
            "# Instruction\nBe kind.\n# Query:\n```\n\n```\n# Answer:\n```\nHello!\n```",
            "line 3: '# Query:' has no text in",
        ),
        ("# Instruction\nBe kind.\n# Query:\n```\nHi?\n```\nwell\n# Answer:\n```\nHello!\n```", "text beside .*'well'"),
        (
            "# Instruction\nBe kind.\n# Query:\n```a```\n# Query:\n```b```",
            "line 5: '# Query:' stands where an answer belongs",
        ),
        (BLOCK + "\n# Answer:\n```c```\n# Query:\n```d```", "line 16: '# Answer:' stands where '# Query:' belongs"),
        (BLOCK + "\0", "null character"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(text.encode())
    with pytest.raises(PromptFileError, match=words) as caught:
        URIAL.load(file)
    assert "prompt.txt" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(BLOCK.replace("kind", "g\xfcltig").encode("latin-1"))
    with pytest.raises(PromptFileError, match=r"not UTF-8 text: byte 0xfc in line 3"):
        URIAL.load(latin)
    large = tmp_path / "large.txt"
    large.write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(PromptFileError, match="larger than"):
        URIAL.load(large)
    for missing in (tmp_path / "none.txt", tmp_path, "nul\0l"):
        with pytest.raises(PromptFileError, match="cannot be read"):
            URIAL.load(missing)
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + BLOCK.replace("\n", "\r\n").encode())
    assert URIAL.load(marked) == URIAL.parse(BLOCK)


def test_a_prompt_longer_than_the_context_is_refused_by_its_own_length() -> None:
    decoder = Decoder.from_pretrained("testbed")
    with pytest.raises(PromptError, match="of them are of the constant prompt alone: use a shorter one"):
        decoder.generate("Hi?", policy=Policy(prompt=URIAL.default()))


# ---- conversations ----------------------------------------------------------------------------------------------------
def says(role: str, content: Any = "Hi.") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_messages_become_a_conversation() -> None:
    messages = [says("system", "Be kind."), says("user", "a"), says("assistant", "b"), says("user", "c")]
    talk = Conversation.of(messages)
    assert talk == Conversation("c", (("a", "b"),), "Be kind.")
    assert talk.messages() == messages
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Conversation.of([says("developer", "x"), says("user", parts)]) == Conversation("ab", (), "x")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "does not end with words of the user"),
        ([says("user"), says("assistant")], "does not end with words of the user"),
        ([says("system")], "does not end with words of the user"),
        ([says("user"), says("user")], "a message of 'user' where one of 'assistant' belongs"),
        ([says("assistant"), says("user")], "a message of 'assistant' where one of 'user' belongs"),
        ([says("user"), says("system"), says("user")], "a message of 'system' where one of 'assistant' belongs"),
        ([says("tool"), says("user")], "message 0 of the talk has the role 'tool'; allowed: system, user, assistant"),
        ([says("user", " ")], "message 0 of the talk has the content ' '"),
        ([says("user", None)], "message 0 of the talk has the content None"),
        ([says("user", [{"type": "image_url"}])], "parts that are not text"),
        (["Hi."], "message 0 of the talk is a str"),
    ],
)
def test_messages_that_are_no_conversation(messages: list[Any], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        Conversation.of(messages, "the talk")


def test_a_decoder_takes_one_conversation_or_many() -> None:
    decoder = Decoder.from_pretrained("testbed")
    talk = [says("user", "How do I paint my fence?"), says("assistant", "With a brush."), says("user", "And my door?")]
    (one,) = decoder.requests(talk)
    text = "Human: How do I paint my fence?\nAssistant: With a brush.\n\nHuman: And my door?\nAssistant:"
    assert (one.prompt, one.prompt_text) == ("And my door?", text)
    assert one.prompt_ids == decoder.codec.encode(text)
    assert decoder.requests([talk, "And my door?"])[0] == one
    with pytest.raises(PromptError, match="prompt 1 does not end with words of the user"):
        decoder.requests(["Hi.", talk[:2]])
    with pytest.raises(PromptError, match="prompt 0 is not text: it holds a lone surrogate"):
        decoder.requests([[says("system", "a\udc80"), says("user", "b")]])


def test_a_model_without_format_uses_its_chat_template() -> None:
    decoder = Decoder.from_pretrained("testbed", format=None)
    talk = [says("system", "Be kind."), says("user", "a"), says("assistant", "b"), says("user", "c")]
    assert decoder.requests("c")[0].prompt_text == "c"
    for messages in (talk, talk[-1:]):
        with pytest.raises(ConfigError, match="has no chat template"):
            decoder.requests(messages)
    tokenizer = decoder.codec.tokenizer
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if messages[0].content == 'no' %}{{ raise_exception('no such talk') }}{% endif %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (request,) = decoder.requests(talk)
    expected = tokenizer.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert request.prompt_ids == expected
    assert decoder.requests(talk[-1:])[0].prompt_text.endswith("user: c\nassistant:")
    with pytest.raises(PromptError, match="no such talk"):
        decoder.requests([says("user", "no")])


@pytest.mark.parametrize("wrong", [{"turn": "x"}, {"reply": "x"}, {"system": "x"}])
def test_a_format_says_where_the_texts_go(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="does not say where the"):
        ChatFormat(**wrong)


def test_a_tokenizer_of_another_model_is_noticed() -> None:
    with pytest.raises(PromptError, match="the model has ids 0 to 104 only: its tokenizer is of another model"):
        tiny_decoder().generate("caf\u00e9")


# ---- answers ----------------------------------------------------------------------------------------------------------
def test_back_ticks_and_ends_of_text_are_removed() -> None:
    cleaner = TextFilter(("```", "<|endoftext|>"))
    assert cleaner.clean("\n Use `x`.\n```\n<|endoftext|>\n") == "Use `x`."
    assert cleaner.settled("a ``") == "a"
    assert cleaner.settled("a ```` b") == "a ` b"
    assert cleaner.settled("a <|endof") == "a"
    assert TextFilter().clean(" a ``` ") == TextFilter().settled(" a ``` ") == " a ``` "


CLEANED = [("```",), ("```", "<|a|>"), ("ab", "a", "`b"), (" `bb", " ", "`a`"), ("a", "ab")]


@given(st.text(alphabet="`ab <|\n", max_size=24), st.sampled_from(CLEANED))
def test_what_is_shown_early_stays(text: str, removed: tuple[str, ...]) -> None:
    cleaner = TextFilter(removed)
    shown = [cleaner.settled(text[:i]) for i in range(len(text) + 1)]
    for before, after in zip(shown, [*shown[1:], cleaner.clean(text)], strict=True):
        assert after.startswith(before)


@pytest.mark.parametrize("search", ["sampling", "rain"])
def test_streamed_pieces_are_the_cleaned_answer(search: str) -> None:
    """Strings that answers hold often are taken out of them, and out of what a function judges."""
    decoder = Decoder.from_pretrained("testbed")
    plain = RAIN.preset("town").format
    assert plain is not None
    form = ChatFormat(plain.turn, stop=plain.stop, removed=(" the ", "help you", "."))
    judged: list[str] = []

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        judged.extend(reply for _, reply in pairs)
        return [0.9] * len(pairs)

    chosen = Sampling() if search == "sampling" else RAIN.preset("town", evaluator=score)
    pieces: dict[int, str] = {}

    def on_text(index: int, piece: str) -> None:
        pieces[index] = pieces.get(index, "") + piece

    prompts = [request.text for request in testbed.sample_requests(4)]
    done = decoder.generate(prompts, search=chosen, policy=Policy(prompt=form), max_new_tokens=40, on_text=on_text)
    raw = decoder.generate(prompts, search=Sampling(), policy=Policy(prompt=plain), max_new_tokens=40)
    for index, answer in enumerate(done):
        assert answer.text == pieces.get(index, "")
        assert answer.text == answer.text.strip() != ""
        assert not any(one in answer.text for one in form.removed)
        if search == "sampling":
            assert answer.token_ids == raw[index].token_ids
            assert answer.text == TextFilter(form.removed).clean(raw[index].text)
    assert bool(judged) == (search == "rain")
    assert not any(one in reply for reply in judged for one in form.removed)


def test_every_search_and_policy_takes_a_urial_prompt() -> None:
    decoder = Decoder(reference_model(), byte_tokenizer(), kv_tokens=2000)
    urial = URIAL.parse(BLOCK)
    for search in (
        Sampling.greedy(),
        RAIN(evaluator=lambda pairs: [0.0] * len(pairs), max_iterations=2, min_new_iterations=1),
    ):
        (done,) = decoder.generate([says("user", "a")], search=search, policy=Policy(prompt=urial), max_new_tokens=4)
        assert "```" not in done.text
        assert len(done.token_ids) <= 4
