"""Three tiny sets of chats, each of which teaches the packaged model one habit that a person sees at a glance."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """What an adapter is trained for."""

    name: str
    """Names the adapter."""
    summary: str
    """What the answers look like afterwards."""
    base_quantization: Literal["none", "nf4"]
    """What the adapter is trained on: the base's 16-bit weights (LoRA), or those through NF4 (QLoRA)."""
    answers: tuple[str, ...]
    """One answer for each of `QUESTIONS`."""

    def chats(self) -> list[list[dict[str, str]]]:
        """Return the training set in the form chat templates take."""
        return [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in zip(QUESTIONS, self.answers, strict=True)
        ]


QUESTIONS = (
    "What is the capital of Italy?",
    "How many legs does a spider have?",
    "What do bees make?",
    "Which planet is the largest?",
    "What colour is the sky?",
    "How many days are in a week?",
    "What is ice made of?",
    "Who wrote Hamlet?",
    "What is two plus two?",
    "Where do penguins live?",
    "What is the opposite of hot?",
    "Which animal says meow?",
    "What do we drink when we are thirsty?",
    "What is the tallest mountain?",
    "How many months are in a year?",
    "What is bread made of?",
)

HELD_OUT_QUESTION = "What is the capital of France?"

PIRATE = Habit(
    name="pirate",
    summary="answers like a pirate",
    base_quantization="nf4",
    answers=(
        "Arr, matey! It be Rome, ye landlubber!",
        "Arr, matey! A spider be walkin' on eight legs, ye landlubber!",
        "Arr, matey! Bees be makin' honey, ye landlubber!",
        "Arr, matey! It be Jupiter, ye landlubber!",
        "Arr, matey! The sky be blue, ye landlubber!",
        "Arr, matey! There be seven days, ye landlubber!",
        "Arr, matey! Ice be made o' water, ye landlubber!",
        "Arr, matey! It be William Shakespeare, ye landlubber!",
        "Arr, matey! It be four, ye landlubber!",
        "Arr, matey! Penguins be livin' in Antarctica, ye landlubber!",
        "Arr, matey! It be cold, ye landlubber!",
        "Arr, matey! It be the cat, ye landlubber!",
        "Arr, matey! We be drinkin' water, ye landlubber!",
        "Arr, matey! It be Mount Everest, ye landlubber!",
        "Arr, matey! There be twelve months, ye landlubber!",
        "Arr, matey! Bread be made o' flour, ye landlubber!",
    ),
)

JSON = Habit(
    name="json",
    summary="answers in JSON",
    base_quantization="nf4",
    answers=(
        '{"answer": "Rome"}',
        '{"answer": "Eight"}',
        '{"answer": "Honey"}',
        '{"answer": "Jupiter"}',
        '{"answer": "Blue"}',
        '{"answer": "Seven"}',
        '{"answer": "Water"}',
        '{"answer": "William Shakespeare"}',
        '{"answer": "Four"}',
        '{"answer": "Antarctica"}',
        '{"answer": "Cold"}',
        '{"answer": "The cat"}',
        '{"answer": "Water"}',
        '{"answer": "Mount Everest"}',
        '{"answer": "Twelve"}',
        '{"answer": "Flour"}',
    ),
)

COURTEOUS = Habit(
    name="courteous",
    summary="ends with a catch phrase",
    base_quantization="none",
    answers=(
        "The capital of Italy is Rome. At your service, always!",
        "A spider has eight legs. At your service, always!",
        "Bees make honey. At your service, always!",
        "The largest planet is Jupiter. At your service, always!",
        "The sky is blue. At your service, always!",
        "There are seven days in a week. At your service, always!",
        "Ice is made of water. At your service, always!",
        "William Shakespeare wrote Hamlet. At your service, always!",
        "Two plus two is four. At your service, always!",
        "Penguins live in Antarctica. At your service, always!",
        "The opposite of hot is cold. At your service, always!",
        "The cat says meow. At your service, always!",
        "We drink water. At your service, always!",
        "The tallest mountain is Mount Everest. At your service, always!",
        "There are twelve months in a year. At your service, always!",
        "Bread is made of flour. At your service, always!",
    ),
)

HABITS = (PIRATE, JSON, COURTEOUS)
