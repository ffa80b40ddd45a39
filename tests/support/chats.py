"""A tiny tokenizer with a chat template, and small conversations."""

import json
import random

CHATML = ("{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
          "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
"""What many models use; it does not say which words are the assistant's."""
MARKED = ("{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
          "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n"
          "{% endgeneration %}"
          "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
"""The same text, with the answers marked."""
FORGETFUL = "{% for message in messages[-2:] %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
"""Shows the last two messages only: the start of a conversation is not the start of its whole."""
WORDS = ("red", "old", "small", "cat", "dog", "bird", "tree", "house", "under", "over", "happy")


def conversation(*turns, system=None):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": words} for i, words in enumerate(turns)]


def conversations(count, seed=1):
    """Questions about words, whose answers are the same words: something that can be learnt."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        turns = []
        for _ in range(draw.randint(1, 3)):
            words = " ".join(draw.choices(WORDS, k=draw.randint(1, 3)))
            turns += [f"say {words}", words]
        found.append(conversation(*turns, system="be brief" if draw.random() < 0.3 else None))
    return found


def write_conversations(path, messages):
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    return path


def train_tokenizer(directory, *, vocab_size=300, template=CHATML):
    """A byte-level BPE trained on the conversations; `<|im_start|>` and `<|im_end|>` are special tokens of it."""
    from transformers import AutoTokenizer

    from nemo_minitron.data.tokenizer import train_bpe

    train_bpe([message["content"] for each in conversations(50) for message in each] + ["system user assistant\n"],
              directory, vocab_size=vocab_size - 2)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory
