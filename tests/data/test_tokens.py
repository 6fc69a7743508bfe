"""One rule for prompts and targets, whatever a tokenizer adds by itself."""

import copy

import pytest

from ludwig_peft_plugin.data import tokens
from ludwig_peft_plugin.data.tokens import AutomaticTokens, encode_prompts, encode_targets

PROMPTS = ["### Instruction: add\n### Response: ", "naïve €", " leading", "x"]
TARGETS = ["def add(a, b):\n    return a + b", "", "naïve café €\n", "    indented"]


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def as_lists(ragged):
    return [row.tolist() for row in ragged]


def test_prompts_and_targets_of_every_kind(tokenizer_of, row_of, kind):
    tokenizer = tokenizer_of(kind)
    assert as_lists(encode_prompts(tokenizer, PROMPTS)) == [row_of(tokenizer, text)[0] for text in PROMPTS]
    expected = [[*bare(tokenizer, text), tokenizer.eos_token_id] for text in TARGETS]
    assert as_lists(encode_targets(tokenizer, TARGETS)) == expected


def test_targets_do_not_depend_on_the_kind(tokenizer_of, byte_level_kinds):
    targets = {str(as_lists(encode_targets(tokenizer_of(kind), TARGETS))) for kind in byte_level_kinds}
    assert len(targets) == 1


def test_bos_written_in_the_text_is_not_doubled(tokenizer_of, bos_kind):
    tokenizer = tokenizer_of(bos_kind)
    with_bos, plain = as_lists(encode_prompts(tokenizer, ["<s>hello", "hello"]))
    assert with_bos.count(tokenizer.bos_token_id) == 1
    assert with_bos[0] == plain[0] == tokenizer.bos_token_id


def test_bos_written_in_the_text_stays_where_none_is_added(tokenizer_of):
    tokenizer = tokenizer_of("bos not added")
    assert as_lists(encode_prompts(tokenizer, ["<s>x"]))[0] == [tokenizer.bos_token_id, *bare(tokenizer, "x")]


def test_eos_written_in_the_text(tokenizer_of):
    for kind in ("eos only", "automatic bos and eos"):
        tokenizer = tokenizer_of(kind)
        eos = tokenizer.eos_token_id
        assert as_lists(encode_targets(tokenizer, ["x</s>"]))[0] == [*bare(tokenizer, "x"), eos]
        # In a prompt it is part of the text (an earlier turn); only the automatic one goes.
        assert as_lists(encode_prompts(tokenizer, ["x</s>"]))[0][-2:] == [*bare(tokenizer, "x"), eos]


def test_a_prompt_is_never_empty(tokenizer_of, row_of, kind):
    tokenizer = tokenizer_of(kind)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert as_lists(encode_prompts(tokenizer, ["", "x"])) == [[first], row_of(tokenizer, "x")[0]]


def test_no_texts_no_rows(tokenizer_of):
    assert len(encode_prompts(tokenizer_of("automatic bos"), [])) == 0
    assert len(encode_targets(tokenizer_of("automatic bos"), [])) == 0


def test_settings_of_the_tokenizer_file_are_ignored(tokenizer_of):
    tokenizer = copy.deepcopy(tokenizer_of("own pad"))
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.truncation_side = "left"
    assert as_lists(encode_prompts(tokenizer, PROMPTS)) == as_lists(encode_prompts(tokenizer_of("own pad"), PROMPTS))


def test_what_a_tokenizer_adds(tokenizer_of):
    assert AutomaticTokens.of(tokenizer_of("eos only")) == AutomaticTokens((), ())
    assert AutomaticTokens.of(tokenizer_of("automatic bos and eos")) == AutomaticTokens((2,), (3,))
    assert AutomaticTokens.of(tokenizer_of("metaspace")) == AutomaticTokens((2,), ())
    assert AutomaticTokens.of(tokenizer_of("slow, automatic eos")) == AutomaticTokens((), (1,))


def test_the_fast_way_gives_what_the_tokenizer_gives(tokenizer_of, kind):
    tokenizer = copy.deepcopy(tokenizer_of(kind))
    texts = [*PROMPTS, *TARGETS, "<s>a</s>", "\U0001f600", "a\r\n\tb " * 300]
    assert tokens._is_plain(tokenizer) == (kind != "slow, automatic eos")
    if not tokens._is_plain(tokenizer):
        return
    for split in (False, True):
        tokenizer.split_special_tokens = split
        for special in (False, True):
            expected = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
            assert tokens._encode_fast(tokenizer, texts, special) == expected
            assert tokens._encode(tokenizer, texts, special) == expected


@pytest.mark.parametrize("name", ["__call__", "_encode_plus", "_switch_to_input_mode"])
def test_a_tokenizer_with_a_way_of_its_own_is_called(tokenizer_of, name):
    tokenizer = copy.deepcopy(tokenizer_of("own pad"))
    kind = type(tokenizer)
    inherited = getattr(kind, name, lambda self: None)
    tokenizer.__class__ = type("Own", (kind,), {name: lambda self, *args, **kwargs: inherited(self, *args, **kwargs)})
    assert not tokens._is_plain(tokenizer)
    assert as_lists(encode_prompts(tokenizer, PROMPTS)) == as_lists(encode_prompts(tokenizer_of("own pad"), PROMPTS))


@pytest.mark.parametrize("characters", [0, 1, 25, 60])
def test_long_texts_are_tokenised_a_few_at_a_time(tokenizer_of, monkeypatch, characters):
    expected = [as_lists(encode(tokenizer_of("eos only"), TARGETS)) for encode in (encode_prompts, encode_targets)]
    sizes = []
    encode_fast = tokens._encode_fast

    def record(tokenizer, texts, special):
        sizes.append((len(texts), sum(map(len, texts))))
        return encode_fast(tokenizer, texts, special)

    monkeypatch.setattr(tokens, "_encode_fast", record)
    monkeypatch.setattr(tokens, "CHARACTERS", characters)
    assert [
        as_lists(encode(tokenizer_of("eos only"), TARGETS)) for encode in (encode_prompts, encode_targets)
    ] == expected
    assert all(texts == 1 or size <= characters for texts, size in sizes)
    assert max(texts for texts, _ in sizes) > 1 or characters < 2
