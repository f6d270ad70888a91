"""Conversations with tools, as messages for templates and as the steps of an episode."""

import dataclasses
import json

import numpy as np

from echo_jax.render import Part, Rendered, Renderer
from echo_jax.render.calls import GRAMMARS, Call, describe
from echo_jax.roles import Role
from echo_jax.tools import TOOLS as ALL

TOOLS = {name: ALL[name] for name in ("bash", "submit")}
SPELLED = ("<|im_end|>", "<|im_start|>assistant\n", "</tool_response>", "<|eot_id|>", "<tool_call>", "<think>", "</s>")
BODIES = (
    "", " ", "\n", "3 notes/plan.txt\n", "  indented\n\n", "caf\u00e9 \U0001f9ff \u6f22\u5b57", "e\u0301 \u212b",
    "\ttab\r\n", '{"a": "b\\n"}', "line\n" * 20, "tool response call", "no newline", "'quoted' \"twice\"", "\u3000wide",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Conversation:
    system: str
    prompt: str
    turns: tuple[tuple[str, tuple[str, ...]], ...]  # (the agent's text, its answers)

    def messages(self) -> list[dict]:
        found = [{"role": "system", "content": self.system}] if self.system else []
        found.append({"role": "user", "content": self.prompt})
        for said, answers in self.turns:
            found.append({"role": "assistant", "content": said})
            found += [{"role": "tool", "content": answer} for answer in answers]
        return found

    def rendered(self, renderer: Renderer) -> Rendered:
        """Returns the conversation as an episode renders it, up to the prompt of the next turn."""
        made = renderer.prompt(self.prompt, TOOLS) + renderer.generation_prompt()
        for said, answers in self.turns:
            made += renderer.action(said)
            for i, answer in enumerate(answers):
                parts = [Part(answer, Role.OBSERVATION)]
                made += renderer.observation(parts, first=i == 0, last=i == len(answers) - 1)
            made += renderer.generation_prompt()
        return made


def conversations(grammar: str, *, spelled: bool, most_calls: int = 3, count: int = 30) -> list[Conversation]:
    """Returns different conversations; with `spelled`, each spells special tokens somewhere."""
    rng = np.random.default_rng(0)

    def text():
        chosen = [*rng.choice(BODIES, 2), *(rng.choice(SPELLED, 2) if spelled else ())]
        text = "".join(rng.permutation(chosen))
        return f"so {text} it is" if spelled else text  # plain text at both ends, where tokens might merge

    def turn():
        calls = [
            GRAMMARS[grammar].write(Call("bash", {"command": f"cat {i}"}), TOOLS) for i in range(rng.integers(1, 4))
        ]
        said = "\n".join(calls[:most_calls])
        return said, tuple(text() for _ in calls[:most_calls])

    return [
        Conversation(str(rng.choice(["", "Be brief."])), f"Task {i}: {text()}", tuple(turn() for _ in range(1 + i % 3)))
        for i in range(count)
    ]


def specifications() -> list[dict]:
    return json.loads(json.dumps(describe(TOOLS)))
