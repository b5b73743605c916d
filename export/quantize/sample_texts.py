"""Short texts of several kinds and short conversations: the default for quantization and parity.

A format is chosen on CHOICE_TEXTS and CHOICE_CONVERSATIONS, and the variant is judged on SAMPLE_TEXTS and
SAMPLE_CONVERSATIONS, so that nothing is judged on the text it was chosen on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from limbeck.export.runtime.text.chat_template import ChatTemplate
from limbeck.registry.core.errors import BadInput

SAMPLE_TEXTS = (
    '''def merge(left, right):
    """Merge two sorted lists into one."""
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    return merged + left[i:] + right[j:]


def sort(values):
    if len(values) < 2:
        return list(values)
    middle = len(values) // 2
    return merge(sort(values[:middle]), sort(values[middle:]))
''',
    """A still is an old machine. The liquid is heated in the pot until its lighter part rises as vapour,
passes through the neck and the long arm, and turns to liquid again where the cold water runs. What comes
first is thrown away, what comes last is kept for the next run, and the middle part is the spirit itself.
The art lies in knowing where one ends and the next begins, and no thermometer has yet replaced the nose.
""",
    """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError(f"amount must be positive, not {amount}")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        return amount
""",
    """The river had risen in the night. By morning the lower road was gone, and the two brothers who kept the
mill stood at the upper window and counted what went by: a door, a dozen apples, a hen-house with the hens
still sitting on its roof. "We ought to fetch the boat," said the elder. "We ought to have built one," said
the younger, and went down to put the flour on the highest shelf.
""",
    """#include <stdio.h>

int main(int argc, char **argv) {
    long total = 0;
    for (int i = 1; i < argc; i++) {
        long value = 0;
        if (sscanf(argv[i], "%ld", &value) == 1)
            total += value;
    }
    printf("%ld\\n", total);
    return 0;
}
""",
    """import json
import sys
from collections import Counter


def main(path):
    counts = Counter()
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            counts.update(json.loads(line)["text"].split())
    for word, count in counts.most_common(20):
        print(f"{count:8d}  {word}")


if __name__ == "__main__":
    main(sys.argv[1])
""",
    """Water boils at 100 degrees Celsius at sea level, and at about 93 degrees on a mountain of 2,000 metres.
The pressure of the air above the water holds its molecules back; where there is less air, fewer degrees are
needed. This is why an egg takes longer to cook in the mountains: the water boils sooner, but it is colder.
""",
    """Die Katze schläft auf dem Fensterbrett. Le café est très chaud, attention à la tasse !
El niño soñó con un dragón. Кошка спит. 猫が寝ている。
Price: 12.50 €; temperature: 4 °C; done ✓ 🐱
""",
    """The committee met four times between March and June. It heard eleven witnesses, among them two engineers of
the water board, and examined the records of the past nine years. It finds that the leak of 1998 was known to the
district office for at least six weeks before the road collapsed, and that no letter of that period was answered.
""",
    """SELECT customers.name, COUNT(orders.id) AS orders, SUM(orders.total) AS spent
FROM customers
LEFT JOIN orders ON orders.customer_id = customers.id
WHERE orders.created_at >= '2023-01-01'
GROUP BY customers.name
HAVING SUM(orders.total) > 1000
ORDER BY spent DESC
LIMIT 25;
""",
    """Dear Mrs. Halloran,

Thank you for your letter of the 14th. I am sorry to hear that the second delivery was late as well. We have spoken
to the carrier, and a replacement for the broken lamp left our warehouse this morning. You should have it by Friday.

Yours sincerely,
P. Okafor
""",
    """In mathematics, a group is a set with an operation that combines any two of its elements into a third. The
operation is associative, there is an identity element, and every element has an inverse. The integers with addition
are the best known example. Groups describe symmetry: the rotations of a square form a group of four elements.
""",
)

CHOICE_TEXTS = (
    '''def gcd(a, b):
    """Return the greatest common divisor of two integers."""
    while b:
        a, b = b, a % b
    return abs(a)


class Fraction:
    def __init__(self, top, bottom):
        shared = gcd(top, bottom)
        self.top, self.bottom = top // shared, bottom // shared

    def __add__(self, other):
        return Fraction(self.top * other.bottom + other.top * self.bottom, self.bottom * other.bottom)
''',
    """Bread needs flour, water, salt and time. The dough is mixed in the evening, folded twice and left on the
kitchen table overnight. In the morning it has doubled, and the baker shapes it into loaves with as little handling as
possible. A hot oven and a bowl of water under the rack give the crust its colour.
""",
    """The old lighthouse keeper counted the ships by their lamps. Three had gone south since midnight, and one, the
smallest, had turned back. He wrote it in the book, as he wrote everything, and put the kettle on. When he looked up
again there were two lights where one had been, close together, and moving slowly towards the rocks.
""",
    """const cache = new Map();

export async function load(url, { retries = 3, timeout = 5000 } = {}) {
  if (cache.has(url)) return cache.get(url);
  for (let attempt = 1; attempt <= retries; attempt++) {
    const response = await fetch(url, { signal: AbortSignal.timeout(timeout) });
    if (response.ok) {
      const data = await response.json();
      cache.set(url, data);
      return data;
    }
  }
  throw new Error(`no answer from ${url}`);
}
""",
    """The treaty was signed on 11 April 1713. Under its terms the fortress passed to the crown, the river was opened
to the ships of both countries, and the prisoners of the last campaign were to be returned without ransom before the
end of the year. Few of them were: the winter was hard, and the roads through the mountains stayed closed until May.
""",
    """Der Zug nach Hamburg fährt heute von Gleis 7. Il pleut depuis trois jours et la rivière monte.
La biblioteca cierra a las ocho. Сегодня холодно. 今日は寒いです。
Total: 1,204.80 USD (incl. 19% tax) — due 31/12 ✓
""",
    """Light takes eight minutes and twenty seconds from the sun to the earth. Sound, if it could travel through empty
space, would need fourteen years. The difference is why lightning is seen before thunder is heard: count the seconds
between them, divide by three, and you have the distance in kilometres.
""",
    """# Installation

1. Download the archive and unpack it.
2. Run `make` and then `sudo make install`.
3. Copy `example.conf` to `/etc/tool.conf` and set `port`, `user` and `log_level`.

If the build fails with *missing header*, install the development package of zlib first.
""",
)

# (question, answer)
SAMPLE_CONVERSATIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Write a short poem about rain.", "Soft rain falls on the roof tonight,\nA gentle drum, a silver light."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What is 12 plus 30?", "12 plus 30 is 42."),
    (
        "Give me three tips for sleeping well.",
        "1. Go to bed at the same time every day.\n2. Keep your bedroom dark and cool.\n3. Put away screens an hour "
        "before bed.",
    ),
    (
        "Why is the sky blue?",
        "The air scatters blue light more than red light, so blue reaches our eyes from every direction.",
    ),
    ("Translate 'good morning' into Spanish.", "'Good morning' in Spanish is 'buenos días'."),
)

CHOICE_CONVERSATIONS = (
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("How do I boil an egg?", "Put the egg into boiling water for eight minutes, then cool it in cold water."),
    ("Name three primary colours.", "The three primary colours are red, yellow and blue."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    (
        "Write a function in Python that doubles a number.",
        "```python\ndef double(number):\n    return 2 * number\n```",
    ),
    ("What is the opposite of cold?", "The opposite of cold is hot."),
)


def render_conversations(artifact: Path, conversations: Sequence[tuple[str, str]]) -> list[str]:
    """Render (question, answer) pairs with the artifact's chat template, special tokens included.

    Returns [] if it has no template, or one that takes no such conversation.
    """
    template = ChatTemplate.read(artifact)
    if template is None:
        return []
    try:
        return [
            template.render(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                add_generation_prompt=False,
            )
            for question, answer in conversations
        ]
    except BadInput:
        return []
