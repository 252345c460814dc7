"""Layouts of any shape, for what must hold for all of them."""

import random

from hypothesis import strategies as st

from convai_fast.dialogue.layout import Layout, Place, Surroundings

# Surroundings that give a text other tokens each.
AROUND = (Surroundings(), Surroundings(trailing="\n"), Surroundings(before="a", leading=" "))
ABC = tuple(Surroundings(leading=letter) for letter in "abc")


def random_layout(seed, max_token=60, known=ABC):
    """A layout of any shape, whose texts stand in places of up to three classes, those `known`."""
    rng = random.Random(seed)

    def piece(least=0):
        return tuple(rng.randint(5, max_token) for _ in range(rng.randint(least, 3)))

    persona_turn = rng.choice(["none", "first", "last"])
    return Layout(
        begin=piece(),
        persona_open=piece(),
        persona_close=piece(),
        persona_turn=persona_turn,
        no_persona=piece(),
        turn_open=(piece(), piece()),
        turn_close=(piece(), piece()),
        partner_begins=persona_turn != "none" or rng.random() < 0.5,
        reply_open=piece(least=1),
        eos=rng.randint(5, max_token),
        ends=(0,),
        pad=rng.randint(0, 4),
        speaker1=rng.randint(5, max_token),
        speaker2=rng.randint(5, max_token),
        surroundings=tuple(rng.choice(known) for _ in Place),
    )


layouts = st.integers(0, 10**6).map(random_layout)
