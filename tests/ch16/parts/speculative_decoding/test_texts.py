"""Tasks as token ids."""

from ch16.parts.speculative_decoding.texts import CODE, CONFIG, COPYING, FLIGHTS, FREE, PASSAGE, prompts


class Tokenizer:
    """One id a character; remembers whether special tokens were asked for."""

    def __init__(self, chat_template):
        self.chat_template, self.special = chat_template, []

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"<user>{chat[0]['content']}<assistant>"

    def __call__(self, text, add_special_tokens=True):
        self.special.append(add_special_tokens)
        return {"input_ids": list(text)}


def test_the_answer_is_begun():
    chat, base = Tokenizer("template"), Tokenizer(None)
    assert "".join(prompts(chat, [("Q", "The")])[0]) == "<user>Q<assistant>The" and chat.special == [False]
    assert "".join(prompts(base, [("Q", "The")])[0]) == "Q\n\nThe" and base.special == [True]


def test_copying_tasks_hold_what_is_to_be_copied():
    for (question, begun), source in zip(COPYING, (CODE, CONFIG, PASSAGE, FLIGHTS), strict=True):
        assert source in question and begun
    assert not any(begun for _, begun in FREE)
