"""The parts of an answer: text, reasoning, tool calls."""
