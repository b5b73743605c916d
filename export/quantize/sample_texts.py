"""Short texts of several kinds: the default for parity and quantization if the user gives no corpus."""

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
)
