"""What the models are asked: tasks whose answers copy much of the question, and tasks that copy nothing."""

from collections.abc import Sequence
from typing import Any

CODE = '''\
def moving_average(values, window):
    """Average of each run of `window` values."""
    if window < 1:
        raise ValueError("window must be at least 1")
    total = sum(values[:window])
    averages = [total / window]
    for i in range(window, len(values)):
        total += values[i] - values[i - window]
        averages.append(total / window)
    return averages


def count_words(text):
    """How often each word of the text occurs."""
    counts = {}
    for word in text.lower().split():
        word = word.strip(".,;:!?")
        if word:
            counts[word] = counts.get(word, 0) + 1
    return counts
'''

CONFIG = """\
server:
  host: 0.0.0.0
  port: 8000
  workers: 4
  timeout_seconds: 30
database:
  host: db.internal
  port: 5432
  name: orders
  pool_size: 20
  retry_seconds: 5
cache:
  host: cache.internal
  port: 6379
  max_memory_mb: 512
  eviction: least_recently_used
logging:
  level: info
  file: /var/log/orders.log
  rotate_mb: 100
"""

PASSAGE = """\
The harbour of Vell froze in the winter of 1841. The ferry could not leave for nine weeks, and the grain ships waited \
outside the mole. Anna Brandt, who kept the lighthouse, counted forty lamps on the ice each night. In February the \
bakers ran out of flour. A party of twelve men walked across the bay to Orsund with three sledges and came back after \
four days with rye, salt and a letter from the governor. The ice broke on the second of March, and the first ship in \
was the Meridian, with coal."""

FLIGHTS = """\
Flight BX204 to Lisbon departs at 07:15 from gate A4. Flight BX318 to Oslo departs at 08:40 from gate C11. Flight \
BX092 to Vienna departs at 09:05 from gate B2. Flight BX571 to Athens departs at 10:30 from gate A9. Flight BX446 to \
Dublin departs at 11:55 from gate C3. Flight BX810 to Prague departs at 13:20 from gate B7."""

# Each with the first words of the answer: a small model then goes on copying.
COPYING = (
    (
        f"Rename the function `count_words` to `word_counts` in this file and print the whole file:\n\n{CODE}",
        'Here is the whole file:\n\ndef moving_average(values, window):\n    """Average of each run',
    ),
    (
        f"Change the port of the server to 9000 in this file and print the whole file:\n\n{CONFIG}",
        "Here is the whole file:\n\nserver:\n  host: 0.0.0.0\n  port: 9000\n  workers: 4\n",
    ),
    (
        f"{PASSAGE}\n\nAnswer from this passage, and quote the sentences that say it: what happened that winter?",
        'The passage says: "The harbour of Vell',
    ),
    (f"{FLIGHTS}\n\nList all of these flights with time and gate, in the same words.", "Flight BX204 to Lisbon"),
)
FREE = (
    ("Write a short story about a lighthouse keeper who finds a map.", ""),
    ("Explain how a bicycle stays upright.", ""),
    ("What could I cook tonight with rice, tomatoes and two eggs?", ""),
    ("Write a letter to a friend who is moving to another country.", ""),
)
TASKS = {"copying": COPYING, "free": FREE}
Texts = dict[str, list[list[int]]]  # prompts by the name of the text, as token ids


def prompts(tokenizer: Any, tasks: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Questions and the first words of their answers as token ids, in the model's chat format if it has one."""
    ids = []
    for question, begin in tasks:
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + begin
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            ids.append(tokenizer(f"{question}\n\n{begin}")["input_ids"])
    return ids
