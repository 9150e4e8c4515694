# SPDX-License-Identifier: Apache-2.0
"""Prompts are distinct from their first characters on, and a seed fixes them."""

import itertools

import pytest

from loadtests.profiles import PROFILES, Profile, chat_messages, completion_prompt, get_profile, seconds_to_burst


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_prompts_are_distinct_from_the_start_and_reproducible(profile: Profile) -> None:
    keys = list(itertools.product((0, 1), range(3), range(6)))
    prompts = [chat_messages(profile, *key) for key in keys]
    assert prompts == [chat_messages(profile, *key) for key in keys]
    assert len({messages[0]["content"][:16] for messages in prompts}) == len(keys)
    assert len({completion_prompt(messages)[:16] for messages in prompts}) == len(keys)


def test_turns_continue_one_conversation() -> None:
    chat = PROFILES["chat"]
    requests = [chat_messages(chat, 0, 0, turn) for turn in range(chat.turns + 1)]
    assert [len(messages) for messages in requests] == [*range(1, 2 * chat.turns, 2), 1]
    assert [message["role"] for message in requests[-2]] == ["user", "assistant"] * (chat.turns - 1) + ["user"]
    for shorter, longer in itertools.pairwise(requests[: chat.turns]):
        assert longer[0]["content"][16:] == shorter[0]["content"][16:]
        assert longer[1 : len(shorter)] == shorter[1:]
    assert requests[-1][0]["content"][16:] != requests[0][0]["content"][16:]


def test_profiles_have_their_shape() -> None:
    def words(name: str) -> int:
        return len(chat_messages(PROFILES[name], 0, 0, 0)[0]["content"].split())

    assert words("long_prompt") > 1000 > 100 > words("chat")
    assert PROFILES["long_prompt"].max_tokens < PROFILES["chat"].max_tokens


def test_bursts_are_on_a_common_grid() -> None:
    burst = PROFILES["burst"]
    assert seconds_to_burst(burst, 0.0) == burst.period_s
    assert seconds_to_burst(burst, 2.25 * burst.period_s) == 0.75 * burst.period_s
    assert seconds_to_burst(PROFILES["chat"], 3.0) == 0.0


def test_unknown_profile() -> None:
    with pytest.raises(ValueError, match="'chaos' is not known; give --profile one of chat, long_prompt, burst"):
        get_profile("chaos")
