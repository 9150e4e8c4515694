# SPDX-License-Identifier: Apache-2.0
"""The shapes of load, and the prompts they send: a function of (profile, seed, user, request) and of nothing else."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

_TEXT = """
river stone market window garden letter winter bridge copper engine forest harbour island journey kitchen ladder
meadow number orange pencil quarter rabbit silver table umbrella valley weather yellow answer bottle candle doctor
evening feather granite history insect jacket kettle lantern morning needle office paper question railway school
thunder uncle village wagon almost before carefully during every follow gather having inside
"""
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Profile:
    """One shape of load.

    Attributes:
        name: The value of ``--profile``.
        turns: User messages in a conversation; request ``r`` of a user is turn ``r % turns`` of its conversation.
        words: Words in a user message.
        answer_words: Words in each earlier answer replayed as history (not the model's own: prompts stay reproducible).
        max_tokens: Output tokens asked for, unless ``--max-tokens`` says otherwise.
        period_s: Seconds between bursts; 0: each user sends its next request at once.
    """

    name: str
    turns: int
    words: int
    answer_words: int
    max_tokens: int
    period_s: float = 0.0


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("chat", turns=4, words=30, answer_words=60, max_tokens=128),
        Profile("long_prompt", turns=1, words=1200, answer_words=0, max_tokens=16),
        Profile("burst", turns=1, words=60, answer_words=0, max_tokens=64, period_s=5.0),
    )
}


def get_profile(name: str) -> Profile:
    """Returns the profile of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is not known; give --profile one of {', '.join(PROFILES)}")
    return PROFILES[name]


def chat_messages(profile: Profile, seed: int, user: int, request: int) -> list[dict[str, str]]:
    """Builds the messages of one chat request.

    The first message starts with a tag found in no other request, so no two prompts share a prefix and a server's
    prefix cache has nothing to reuse, not even between the turns of one conversation.

    Args:
        profile: Shape of load.
        seed: Value of ``--seed``; the same four arguments give the same messages.
        user: Number of the simulated user, from 0.
        request: Number of the request among this user's, from 0.

    Returns:
        Messages of alternating roles, from the user's first to the user's latest.
    """
    conversation, turn = divmod(request, profile.turns)
    words = random.Random(f"{seed}/{profile.name}/{user}/{conversation}")
    messages = [
        message
        for _ in range(turn + 1)
        for message in (
            {"role": "user", "content": " ".join(words.choices(WORDS, k=profile.words)) + ". Tell a story about it."},
            {"role": "assistant", "content": " ".join(words.choices(WORDS, k=profile.answer_words)) + "."},
        )
    ][:-1]
    tag = hashlib.sha256(f"{seed}/{profile.name}/{user}/{request}".encode()).hexdigest()[:16]
    messages[0]["content"] = f"{tag} {messages[0]['content']}"
    return messages


def completion_prompt(messages: Sequence[dict[str, str]]) -> str:
    """Joins chat messages into one text for /v1/completions; it starts with the tag, before any other word."""
    return "\n\n".join(message["content"] for message in messages)


def seconds_to_burst(profile: Profile, elapsed_s: float) -> float:
    """Seconds from ``elapsed_s`` after the start of the run to the next burst; 0 for a profile without bursts."""
    return profile.period_s - elapsed_s % profile.period_s if profile.period_s else 0.0
