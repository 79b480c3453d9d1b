"""`prefmix chat POLICY --user anna`: a conversation in which the user can be changed."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prefmix.cli.generate import DECODERS, add_sampling, objective_weights, sampling
from prefmix.cli.loading import add_policy, load_policy
from prefmix.cli.output import note, stdout_is_for_results
from prefmix.data.counted import counted

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy

HELP = """/user NAME      speak as this user (/user alone: as nobody in particular)
/decoder NAME   sample, mixture, top or product
/weights        the weights of the experts for this user
/reset          forget the conversation
/quit           leave"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_policy(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> None:
    """Answers lines until /quit or the end of the input; from a pipe, stdout holds the answers and nothing else."""
    options = sampling(args)
    with stdout_is_for_results():
        policy = load_policy(args)
        options |= objective_weights(args, policy)
    talk = Conversation(policy, options)
    if sys.stdin.isatty():
        known = counted(len(policy.users), "known user")
        note(f"{counted(policy.config.num_experts, 'expert')}, {known}; /help lists commands")
    for line in _typed(talk) if sys.stdin.isatty() else sys.stdin:
        if line.strip():
            talk.say(line.strip())
        if not talk.is_open:
            break


def _typed(talk: Conversation) -> Iterator[str]:
    """Lines that a person types, each after a prompt that says who speaks."""
    while True:
        try:
            yield input(f"{talk.options['user'] or 'you'}> ")
        except EOFError:
            print()
            return


class Conversation:
    """What has been said so far, and as whom.

    Attributes:
        options: keyword arguments of `MixturePolicy.generate`.
        messages: the conversation, where the tokenizer has a chat template; else each line stands alone.
        is_open: false after /quit.
    """

    def __init__(self, policy: MixturePolicy, options: dict[str, Any]) -> None:
        self.policy = policy
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.is_open = True
        self._answered = False

    def say(self, line: str) -> None:
        """Answers a line, or obeys it where it is a command."""
        if line.startswith("/"):
            self._obey(line)
            return
        self.messages.append({"role": "user", "content": line})
        chats = self.policy.tokenizer.chat_template is not None
        answer = ""
        with warnings.catch_warnings():
            if self._answered:  # whoever is unknown is told once
                warnings.filterwarnings("ignore", message="unknown users", category=UserWarning)
            pieces = self.policy.generate(self.messages if chats else line, stream=True, **self.options)
        self._answered = True
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
        print()
        self.messages.append({"role": "assistant", "content": answer})

    def _obey(self, line: str) -> None:
        command, _, value = line.partition(" ")
        value = value.strip()
        if command in ("/quit", "/exit"):
            self.is_open = False
        elif command == "/user":
            self._become(value or None)
        elif command == "/decoder":
            self._decode_by(value)
        elif command == "/weights":
            print(weight_lines(self.policy, self.options["user"], self.options["metadata"]))
        elif command == "/reset":
            self.messages.clear()
            note("a new conversation")
        elif command == "/help":
            print(HELP)
        else:
            print(f"unknown command {command}\n{HELP}")

    def _decode_by(self, decoder: str) -> None:
        if decoder not in DECODERS:
            print(f"unknown decoder {decoder or '(none given)'}; known: {', '.join(DECODERS)}")
            return
        self.options["decoder"] = decoder
        note(f"decoder {decoder} from here on")  # not among the answers of a pipe

    def _become(self, user: str | None) -> None:
        if user is not None and user not in self.policy.users:
            print(f"{user} is unknown; known: {', '.join(self.policy.users.names[:8])} ... `prefmix adapt` adds a user")
            return
        self.options["user"] = user
        if user is not None:
            self.options.pop("weights", None)  # of somebody unknown
        self.messages.clear()
        note(f"{user or 'nobody known'} from here on, in a new conversation")


def weight_lines(policy: MixturePolicy, user: str | None, metadata: dict[str, Any] | None = None) -> str:
    """The weights of the experts as bars, one line an expert."""
    weights = policy.weights(user=user, metadata=metadata).tolist()
    return "\n".join(f"expert {k}  {w:6.3f}  {'#' * round(40 * w)}" for k, w in enumerate(weights))
